"""What a careful reader of a table should know: the notes of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...recurrences import HybridSpec, RecurrenceSpec, layers_of
from ...registry import presets
from ..config import Part
from .arms import Arm

FEW_SEEDS = 3
MOST_NAMES = 4
"""Arms that a note names, before it counts the rest."""


def where(part: Part) -> str:
    """The part's name before a message, where there are several."""
    return f"{part.name}: " if part.name else ""


def notes_on(part: Part, arms: Sequence[Arm], vocabularies: set[int]) -> list[str]:
    """Warnings of the arms' recurrences, and what makes a comparison unfair or a table mean less than it seems to."""
    found = [*_warnings(arms), *_patterns(arms), *_variations(arms), *_vocabularies(arms, vocabularies)]
    if len(part.seeds) < FEW_SEEDS:
        found.append(f"{len(part.seeds)} seed(s): confidence intervals need at least 2, and mean little below {FEW_SEEDS}")
    return [where(part) + note for note in [*found, *_controls(arms)]]


def _listed(names: Iterable[str]) -> str:
    """`gdn, kla`, or `gdn, kla, ... and 7 more`."""
    given = list(names)
    shown = given if len(given) <= MOST_NAMES else given[: MOST_NAMES - 1]
    return ", ".join(shown) + (f" and {len(given) - len(shown)} more" if len(given) > len(shown) else "")


def _warnings(arms: Sequence[Arm]) -> list[str]:
    """Each warning once, with the arms that it is about."""
    about: dict[str, list[str]] = {}
    for arm in arms:
        for warning in arm.spec.warnings():
            about.setdefault(warning, []).append(arm.name)
    return [f"{_listed(names)}: {warning}" for warning, names in about.items()]


def _patterns(arms: Sequence[Arm]) -> list[str]:
    """Patterns that end in the middle."""
    notes = []
    for arm in arms:
        n = len(layers_of(arm.spec))
        if arm.model.layers % n:
            notes.append(f"{arm.name}: {arm.model.layers} layers are no multiple of the pattern's {n}; its last repeat is cut")
    return notes


def _variations(arms: Sequence[Arm]) -> list[str]:
    """Arms whose models differ in more than the axes, since their preset gives some cards other sizes."""
    notes = []
    for name in dict.fromkeys(arm.model.preset for arm in arms if arm.model.preset):
        mine = [arm for arm in arms if arm.model.preset == name]
        about: dict[str, list[str]] = {}
        for arm in mine:
            about.setdefault(", ".join(f"{key} {change}" for key, change in arm.varied.items()), []).append(arm.name)
        if len(about) > 1:
            told = "; ".join(f"{_listed(names)}: {changes}" for changes, names in about.items() if changes)
            notes.append(f"arms of {name} differ in more than the axes: {told} (model.variation: none gives every arm one shape)")
        varied = presets.load(name).varied_cards()
        for arm in mine:
            card = next((layer.name for layer in layers_of(arm.spec) if layer.name in varied), None)
            if isinstance(arm.spec, HybridSpec) and card and arm.model.variation == "auto":
                hint = f"model.variation: {card} takes {card}'s"
                notes.append(f"{arm.name}: a pattern takes no variation of {name} by itself; {hint}")
    return notes


def _vocabularies(arms: Sequence[Arm], vocabularies: set[int]) -> list[str]:
    """Presets in full width, whose published number of parameters is that of another vocabulary."""
    notes = []
    for name in dict.fromkeys(arm.model.preset for arm in arms if arm.model.preset):
        preset = presets.load(name)
        full = any(arm.model.width == preset.width for arm in arms if arm.model.preset == name)
        if full and vocabularies != {preset.vocab}:
            sizes = " and ".join(f"{size:,}" for size in sorted(vocabularies))
            notes.append(
                f"{name} has a vocabulary of {preset.vocab:,}, the task one of {sizes}: embeddings and parameters differ "
                "from the published ones"
            )
    return notes


def _controls(arms: Sequence[Arm]) -> list[str]:
    """Preconditioners that are compared without their gain-matched control."""
    notes = []
    specs = [layer for arm in arms for layer in layers_of(arm.spec) if isinstance(layer, RecurrenceSpec)]
    kinds = {spec.preconditioner.name for spec in specs}
    for kind in sorted(kinds - {"none"}) if len(kinds) > 1 else ():
        chosen = [spec.preconditioner for spec in specs if spec.preconditioner.name == kind]
        if not any(getattr(choice.config, "control", "") == "mean" for choice in chosen):
            notes.append(
                f"the preconditioner {kind!r} is compared without its gain-matched control: add an arm with "
                f"{{name: {kind}, control: mean}}, since a uniform multiplier acts like a larger step size"
            )
    return notes
