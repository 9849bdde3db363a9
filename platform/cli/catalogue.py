"""`deltalab list` and `deltalab describe`: what there is, and what it means."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...errors import UserError, unknown
from .app import Import, Registry, Root, console, use

if TYPE_CHECKING:
    from ...recurrences import MixerSpec
    from ..tracking import StudyRow

MOST_PRESETS = 4
KINDS = ("recurrences", "components", "presets", "tasks", "studies")
COLUMNS = 100
"""Width of what is printed into a file or a pipe."""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("list")(list_things)
    app.command("describe")(describe)


def list_things(
    kind: Annotated[str | None, typer.Argument(metavar="[KIND]", help=f"{' | '.join(KINDS)}; default: all.")] = None,
    root: Root = None,
    registry: Registry = None,
    modules: Import = None,
) -> None:
    """List recurrences, components, model presets, tasks and studies: shipped ones, one's own, and what was run under the root.

    Examples:

      deltalab list

      deltalab list components

      deltalab list recurrences --registry cards --import my_gates
    """
    if kind is not None and kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    use(registry, modules)
    out = _console()
    for chosen in [kind] if kind else KINDS:
        table = Table(title=chosen, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
        rows = _recurrences(out.width) if chosen == "recurrences" else _ROWS[chosen]()
        for row in [*rows, *(_run_studies(root) if chosen == "studies" else [])]:
            table.add_row(*[escape(cell) for cell in row])
        out.print(table)
        for problem in _problems(chosen):
            out.print(f"[red]broken[/] {escape(problem)}")
        out.print()


def _console() -> Console:
    """The console; where nobody looks at a terminal, lines are a little wider than Rich's 80 columns."""
    out = console()
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out.width = COLUMNS
    return out


def _problems(kind: str) -> list[str]:
    """Cards that cannot be used, and plug-ins that cannot be imported."""
    if kind == "recurrences":
        from ...registry.sources import sources

        return sources().problems
    if kind in ("components", "tasks"):
        from ... import plugins

        return plugins.attempt()
    return []


def _recurrences(columns: int) -> list[tuple[str, ...]]:
    """One line a card; what is wrong with one is said in full."""
    from ...plugins import attempt
    from ...registry.loader import load_from
    from ...registry.sources import sources

    attempt()
    rows: list[tuple[str, ...]] = []
    cards = sources().cards
    space = columns - max(map(len, cards)) - 2
    for name, card in sorted(cards.items()):
        mark = "" if card.origin == "deltalab" else f"[{card.origin}] "
        try:
            spec = load_from(cards, name)
            line = " ".join(f"{mark}{spec.about.title or name} | {_summary(spec)}".split())
            rows.append((name, line if len(line) <= space else f"{line[: space - 3].rstrip()}..."))
        except UserError as error:
            rows.append((name, f"{mark}broken: {error}"))
    return rows


def _summary(spec: MixerSpec) -> str:
    """The choices that say something, in a few words."""
    from ...recurrences import AttentionSpec, HybridSpec

    if isinstance(spec, HybridSpec):
        return " ".join(layer.name for layer in spec.layers)
    if isinstance(spec, AttentionSpec):
        return f"attention, window {spec.window}" if spec.window else "attention"
    usual = {"step_size": ("sigmoid",), "erase": ("delta",), "value_gain": ("one",)}
    words = [
        f"{axis.replace('_', ' ')} {choice.name}"
        for axis, choice in spec.choices().items()
        if choice.name not in usual.get(axis, ("none",))
    ]
    return ", ".join(words + ([f"{spec.substeps} substeps"] if spec.substeps > 1 else [])) or "delta rule"


def _components() -> list[tuple[str, ...]]:
    from ...recurrences import AXES, components
    from ...recurrences.component import origin

    rows: list[tuple[str, ...]] = []
    for axis in AXES:
        for name, cls in components(axis).items():
            whose = origin(cls)
            rows.append((axis, name, cls.equation() + ("" if whose == "deltalab" else f"  [{whose}]")))
    return rows


def _presets() -> list[tuple[str, ...]]:
    from ...registry import presets

    found = [presets.load(name) for name in presets.names()]
    return [(preset.name, preset.title, f"cards: {', '.join(preset.cards)}") for preset in found]


def _tasks() -> list[tuple[str, ...]]:
    from ..tasks import task_class, task_names
    from ..tasks.registry import origin

    rows: list[tuple[str, ...]] = []
    for cls in map(task_class, task_names()):
        whose = origin(cls)
        summary = cls.summary + ("" if whose == "deltalab" else f"  [{whose}]")
        rows.append((cls.name, f"v{cls.version}", summary, f"presets: {_some(list(cls.presets))}"))
    return rows


def _some(names: list[str]) -> str:
    """The first names, and how many more there are: `describe` has them all."""
    shown = names if len(names) <= MOST_PRESETS + 1 else names[:MOST_PRESETS]
    return (", ".join(shown) or "none") + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def _studies() -> list[tuple[str, ...]]:
    from ..config import load_study, study_names

    return [(name, load_study(name).description) for name in study_names()]


def _run_studies(root: str | None) -> list[tuple[str, ...]]:
    """The studies of the ledger, with where their trials stand."""
    return [
        (row.study, f"run here: {row.finished} of {row.trials} trials finished, {row.launches} launches")
        for row in _ledger_studies(root)
    ]


def _ledger_studies(root: str | None) -> list[StudyRow]:
    from ..config import DataRoot
    from ..tracking import Ledger, NoResultsError

    try:
        with Ledger.open(DataRoot.find(root).ledger, create=False) as ledger:
            return ledger.studies()
    except NoResultsError:
        return []


_ROWS = {"components": _components, "presets": _presets, "tasks": _tasks, "studies": _studies}


def describe(
    name: Annotated[str, typer.Argument(help="A recurrence (name, YAML file or pattern), component, preset, task or study.")],
    against: Annotated[str | None, typer.Option("--against", metavar="CARD", help="Show in what the recurrence differs.")] = None,
    width: Annotated[int, typer.Option("--width", min=1, max=65536, help="Model width that sizes are counted for.")] = 1024,
    heads: Annotated[int, typer.Option("--heads", min=1, max=4096, help="Heads that sizes are counted for.")] = 8,
    root: Root = None,
    registry: Registry = None,
    modules: Import = None,
) -> None:
    """Explain one recurrence, component, preset, task or study: equation, source, parameters, cost, settings, caveats.

    A study may also be one that was run under the data root: its latest launch is shown.

    Examples:

      deltalab describe osdn

      deltalab describe osdn --against deltanet

      deltalab describe kda --width 2048 --heads 16

      deltalab describe 'gdn gdn gdn softmax'           a pattern of layers

      deltalab describe my_card.yaml --import my_gates   a card of your own

      deltalab describe hypergradient                    a component's options

      deltalab describe gate:tied                        of one axis alone

      deltalab describe pdn-1b                           a published model

      deltalab describe mqar
    """
    use(registry, modules)
    from .describe_card import buildable, describe_against, describe_card

    out = _console()
    if against is not None:
        with buildable(f"{name} or {against}", width, heads):
            describe_against(name, against, width, heads, out)
        return
    found = 0
    if _is_card(name):
        with buildable(name, width, heads):
            describe_card(name, width, heads, out)
        found += 1
    for explain in (_describe_components, _describe_rest):
        found += explain(name, found, (width, heads), root, out)
    if not found:
        raise _unknown_name(name, root)


def _is_card(name: str) -> bool:
    from ...registry.sources import SUFFIXES, sources

    return name in sources().cards or name.endswith(SUFFIXES) or len(name.split()) > 1


def _describe_components(name: str, before: int, size: tuple[int, int], root: str | None, out: Console) -> int:
    """Every component of that name, or the one of `axis:name`; how many there are."""
    from ...recurrences import AXES, components
    from .describe_component import describe_component

    axis, colon, short = name.partition(":")
    found = [
        components(a)[n] for a in AXES for n in components(a) if n == (short if colon else name) and (not colon or a == axis)
    ]
    for i, cls in enumerate(found):
        if before or i:
            out.rule(style="dim")
        describe_component(cls, *size, out)
    return len(found)


def _describe_rest(name: str, before: int, size: tuple[int, int], root: str | None, out: Console) -> int:
    """A preset, a task, a shipped study, a study that was run here; how many there are."""
    from ...registry import presets
    from ..config import study_names
    from ..tasks import task_class, task_names
    from .describe_study import describe_launch, describe_study, describe_task

    found = 0
    if name in presets.aliases():
        from .describe_preset import describe_preset

        describe_preset(presets.load(name), out)
        found += 1
    if name in task_names():
        describe_task(task_class(name), out)
        found += 1
    if name in study_names():
        describe_study(name, out)
        found += 1
    if name in [row.study for row in _ledger_studies(root)]:
        describe_launch(name, root, out)
        found += 1
    return found


def _unknown_name(name: str, root: str | None) -> UserError:
    """What could have been meant; and what is broken, since it may be just that."""
    from ... import plugins
    from ...recurrences import AXES, components
    from ...registry import presets
    from ...registry.sources import sources
    from ..config import study_names
    from ..tasks import task_names

    cards = sources()
    run_here = [row.study for row in _ledger_studies(root)]
    named = [n for axis in AXES for n in components(axis)]
    everything = [*cards.cards, *named, *presets.aliases(), *task_names(), *study_names(), *run_here]
    error = unknown("name", name, set(everything))
    problems = [*cards.problems, *plugins.attempt()]
    return UserError("\n".join([str(error), *(f"broken: {problem}" for problem in problems)])) if problems else error
