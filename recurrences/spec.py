"""What a recurrence is: one choice per axis over the general step, plus the settings that all arms of a study share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar, cast

from ..errors import UserError, shown, unknown
from ..strict import build, item, join, option, plain
from . import erase, exact, forgetting, gates, preconditioners, step_sizes, value_gains
from .component import AXES, DEFAULTS, Choice, Erase, Preconditioner, StepSize, choose
from .settings import Block, QueryKey

# Importing the modules above is what registers the built-in components.
_ = (erase, exact, forgetting, gates, preconditioners, step_sizes, value_gains)

S = TypeVar("S")
ROPE_BASE = 10_000.0
MOST_SUBSTEPS = 8
_ATTENTION_BLOCK = ("short_conv", "head_width", "expand_v")


@dataclass(frozen=True)
class About:
    """What every card says of itself."""

    name: str
    title: str = ""
    equation: str = ""
    source: str = ""
    caveats: tuple[str, ...] = ()


@dataclass(frozen=True)
class AttentionSpec:
    """Softmax attention, the non-recurrent baseline: causal, rotary positions, a key-value cache as its state."""

    about: About
    block: Block = field(default_factory=Block)
    rope_base: float = ROPE_BASE
    window: int = 0
    """Tokens that are seen, a token's own included; 0: all before it."""

    @property
    def name(self) -> str:
        return self.about.name

    def effective(self) -> dict[str, Any]:
        """Everything that changes the numbers, defaults written out; the name is not part of it."""
        block = {name: getattr(self.block, name) for name in _ATTENTION_BLOCK}
        return {"kind": "softmax", "block": block, "rope_base": self.rope_base, "window": self.window}

    def warnings(self) -> list[str]:
        """Settings of the block that a study shares among its arms and that attention does not have."""
        default, own = Block(), self.block
        names = [f.name for f in fields(Block) if f.name not in _ATTENTION_BLOCK]
        unused = [name for name in names if getattr(own, name) != getattr(default, name)]
        return [f"block.{name} has no effect on softmax attention" for name in unused]


@dataclass(frozen=True)
class _AttentionOptions:
    """Attention's own settings."""

    rope_base: float = option(ROPE_BASE, "base of the rotary positions' wavelengths", above=1, max=1e12)
    window: int = option(0, "tokens that are seen, a token's own included; 0: all before it", min=0, max=2**31)


@dataclass(frozen=True)
class _RecurrenceOptions:
    """A recurrence's settings that are no components."""

    substeps: int = option(
        1, "writes per token, each with a key, value and step of its own (DeltaProduct)", min=1, max=MOST_SUBSTEPS
    )


@dataclass(frozen=True)
class RecurrenceSpec:
    """One choice per axis of S_t = a S_{t-1} + w e^T, e = v - (a S_{t-1})^T r (recurrences.md, section 1)."""

    about: About
    gate: Choice
    step_size: Choice
    preconditioner: Choice
    forgetting: Choice
    erase: Choice
    value_gain: Choice
    feedback: Choice
    substeps: int = 1
    qk: QueryKey = field(default_factory=QueryKey)
    block: Block = field(default_factory=Block)

    def __post_init__(self) -> None:
        for axis, choice in self.choices().items():
            reason = choice.component.conflict(choice.config, self)
            if reason:
                raise UserError(f"{axis}: {reason}")

    @property
    def name(self) -> str:
        return self.about.name

    @property
    def erases(self) -> bool:
        """True where the memory is read with the key before it is written."""
        return cast(type[Erase], self.erase.component).reads

    @property
    def remembers(self) -> bool:
        """True where the preconditioner carries a statistic, so that there is something to forget."""
        return cast(type[Preconditioner], self.preconditioner.component).has_statistic

    @property
    def limits_step(self) -> bool:
        """True where the preconditioner keeps a write stable, whatever beta and the key are."""
        return cast(type[Preconditioner], self.preconditioner.component).limits_step(self.preconditioner.config)

    @property
    def unit_keys(self) -> bool:
        """True where the keys that reach preconditioner and kernel have norm <= 1."""
        return self.qk.normalise_k == "l2" or cast(type[StepSize], self.step_size.component).unit_keys

    def choices(self) -> dict[str, Choice]:
        """Axis -> choice."""
        return {axis: getattr(self, axis) for axis in AXES}

    def effective(self) -> dict[str, Any]:
        """Everything that changes the numbers, defaults written out; the name is not part of it.

        Without a statistic there is nothing to forget, so the forgetting is left out: specs that differ only there are one.
        """
        chosen = {axis: choice.effective() for axis, choice in self.choices().items()}
        if not self.remembers:
            chosen["forgetting"] = {"name": "none"}
        rest = {"substeps": self.substeps, "qk": plain(self.qk), "block": plain(self.block)}
        return {"kind": "recurrence", **chosen, **rest}

    def warnings(self) -> list[str]:
        """What a user should know before trusting a run of this spec: settings without effect, steps outside the stable range."""
        found, preconditioner = [], cast(type[Preconditioner], self.preconditioner.component)
        if not self.remembers and self.forgetting.name != "none":
            found.append(
                f"forgetting: {self.forgetting.name} has no effect: preconditioner {self.preconditioner.name} carries no "
                "statistic that it could forget"
            )
        for choice in self.choices().values():
            found += choice.component.cautions(choice.config, self)
        if self.erases and not self.unit_keys and not preconditioner.limits_key(self.preconditioner.config):
            found.append("qk.normalise_k: none with an erase is unstable for keys longer than sqrt(2 / beta)")
        if self.block.output_gate_rank and self.block.output_gate == "none":
            found.append("block.output_gate_rank has no effect without an output gate")
        return found

    def regression_view(self) -> dict[str, str]:
        """The recurrence as a regression at test time: decay, gain, preconditioner and how it is solved."""
        kind, side = self.preconditioner.name, getattr(self.preconditioner.config, "side", "write")
        where = {"write": "write key", "query": "query", "both": "write key and query"}[side]
        exactness = "exact" if kind == "exact" else "approximate"
        return {
            "decay": str(self.gate) if self.step_size.name != "longhorn" or self.gate.name != "none" else "set by the step",
            "gain": str(self.step_size),
            "preconditioner": "none" if kind == "none" else f"{where}, {exactness}",
            "solve": "online (delta rule)" if self.erases else "offline (linear attention)",
        }


@dataclass(frozen=True)
class HybridSpec:
    """A pattern of layers, repeated down the model: `gdn gdn gdn softmax`."""

    about: About
    layers: tuple[RecurrenceSpec | AttentionSpec, ...]

    @property
    def name(self) -> str:
        return self.about.name

    def effective(self) -> dict[str, Any]:
        """The shortest pattern that gives the same layers; of one kind of layer alone, that layer."""
        layers = [layer.effective() for layer in self.layers]
        n = len(layers)
        period = next(p for p in range(1, n + 1) if n % p == 0 and layers == layers[:p] * (n // p))
        return layers[0] if period == 1 else {"kind": "hybrid", "layers": layers[:period]}

    def warnings(self) -> list[str]:
        """Those of its layers."""
        return list(dict.fromkeys(warning for layer in self.layers for warning in layer.warnings()))


LayerSpec = RecurrenceSpec | AttentionSpec
MixerSpec = LayerSpec | HybridSpec
SPECS = (RecurrenceSpec, AttentionSpec, HybridSpec)
_ABOUT = ("name", "title", "equation", "source", "caveats")
_OWN = {
    "recurrence": (*AXES, "substeps", "qk", "block"),
    "softmax": ("block", "rope_base", "window"),
    "hybrid": ("layers",),
}
"""Kind of card -> its keys beside those that say what it is."""


def layers_of(spec: MixerSpec) -> tuple[LayerSpec, ...]:
    """The pattern of a spec: itself alone, or a hybrid's layers."""
    return spec.layers if isinstance(spec, HybridSpec) else (spec,)


def with_block(spec: MixerSpec, changes: Mapping[str, Any], path: str = "block") -> MixerSpec:
    """The spec with settings of its block changed, in every layer."""
    if isinstance(spec, HybridSpec):
        return replace(spec, layers=tuple(cast(LayerSpec, with_block(layer, changes, path)) for layer in spec.layers))
    return replace(spec, block=build(Block, {**plain(spec.block), **changes}, path))


def spec_from_mapping(card: Mapping[str, Any], path: str = "recurrence") -> MixerSpec:
    """A spec from a card's content. Unknown keys, components and options are errors that name the path.

    `kind: softmax` makes an attention card (`block`, `rope_base`, `window`), `kind: hybrid` a pattern (`layers`, each the content
    of a card); anything else is a recurrence.
    """
    if not isinstance(card, Mapping):
        raise UserError(f"{path}: expected a card's content, got {shown(card)}")
    kind = card.get("kind", "recurrence")
    if kind not in _OWN:
        raise unknown("kind", kind, _OWN, join(path, "kind"))
    for key in card:
        if key not in (*_ABOUT, "kind", *_OWN[kind]):
            raise unknown("key", key, (*_ABOUT, "kind", *_OWN[kind]), join(path, key))
    about = build(About, {key: card[key] for key in _ABOUT if key in card}, path)
    if kind == "hybrid":
        return HybridSpec(about, _layers(card, about, path))
    block = _section(Block, card, "block", path)
    if kind == "softmax":
        own = build(_AttentionOptions, {key: card[key] for key in ("rope_base", "window") if key in card}, path)
        return AttentionSpec(about, block, own.rope_base, own.window)
    chosen = {axis: choose(axis, card.get(axis, DEFAULTS[axis]), join(path, axis)) for axis in AXES}
    options = build(_RecurrenceOptions, {key: card[key] for key in ("substeps",) if key in card}, path)
    qk = _section(QueryKey, card, "qk", path)
    try:
        return RecurrenceSpec(about=about, **chosen, substeps=options.substeps, qk=qk, block=block)
    except UserError as error:
        raise UserError(join(path, error)) from error


def _layers(card: Mapping[str, Any], about: About, path: str) -> tuple[LayerSpec, ...]:
    content, place = card.get("layers"), join(path, "layers")
    if not isinstance(content, Sequence) or isinstance(content, str) or not content:
        raise UserError(f"{place}: expected a list of cards' contents, got {shown(content)}")
    layers: list[LayerSpec] = []
    for i, layer in enumerate(content):
        if not isinstance(layer, Mapping):
            raise UserError(f"{item(place, i)}: expected a card's content, got {shown(layer)}")
        layers += layers_of(spec_from_mapping({"name": about.name, **layer}, item(place, i)))
    return tuple(layers)


def _section(cls: type[S], card: Mapping[str, Any], key: str, path: str) -> S:
    """The settings under `key`, which may be left out or left empty."""
    content = card.get(key)
    return build(cls, {} if content is None else content, join(path, key))
