"""What a recurrence is: one choice per axis over the general step, plus the settings that all arms of a study share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from ..errors import UserError, shown, unknown
from ..strict import build, join, option, plain
from . import forgetting, gates, preconditioners, step_sizes
from .component import AXES, Choice, choose

# Importing the four modules above is what registers the built-in components.
_ = (forgetting, gates, preconditioners, step_sizes)

S = TypeVar("S")
Erase = Literal["delta", "none"]
ROPE_BASE = 10_000.0
_ATTENTION_BLOCK = ("short_conv", "head_width", "expand_v")


@dataclass(frozen=True)
class QueryKey:
    """What happens to queries and keys after their projection and short convolution."""

    feature_map: Literal["none", "elu1", "softmax"] = option("none", "of q and k, before they are normalised: elu1 is elu(x) + 1")
    normalise_q: Literal["l2", "none"] = option("l2", "l2: q / sqrt(|q|^2 + 1e-6)")
    normalise_k: Literal["l2", "none"] = option("l2", "l2: k / sqrt(|k|^2 + 1e-6)")


@dataclass(frozen=True)
class Block:
    """The layer around the recurrence. Arms of one comparison share it unless it is the axis."""

    short_conv: int = option(4, "width of the causal convolution on q, k, v; 0: none", min=0, max=64)
    output_norm: bool = option(True, "RMSNorm per head on the output")
    output_gate: Literal["none", "silu", "sigmoid"] = option("none", "gate on the normalised output")
    head_width: int = option(0, "key width of a head; 0: model width / heads", min=0, max=65536)
    expand_v: float = option(1.0, "value width / key width", above=0, max=64)
    skip: bool = option(False, "add D * v to the output, D learned per head from 1 (Mamba-2)")


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

    @property
    def name(self) -> str:
        return self.about.name

    def effective(self) -> dict[str, Any]:
        """Everything that changes the numbers, defaults written out; the name is not part of it."""
        block = {name: getattr(self.block, name) for name in _ATTENTION_BLOCK}
        return {"kind": "softmax", "block": block, "rope_base": self.rope_base}

    def warnings(self) -> list[str]:
        """Settings of the block that a study shares among its arms and that attention does not have."""
        default, own = Block(), self.block
        unused = [name for name in ("output_gate", "skip") if getattr(own, name) != getattr(default, name)]
        return [f"block.{name} has no effect on softmax attention" for name in unused]


@dataclass(frozen=True)
class _Rotary:
    """Attention's own setting."""

    rope_base: float = option(ROPE_BASE, "base of the rotary positions' wavelengths", above=1, max=1e12)


@dataclass(frozen=True)
class RecurrenceSpec:
    """One choice per axis of S_t = a S_{t-1} + w e^T, e = v - (a S_{t-1})^T r (recurrences.md, section 1)."""

    about: About
    gate: Choice
    step_size: Choice
    preconditioner: Choice
    forgetting: Choice
    erase: Erase = "delta"
    qk: QueryKey = field(default_factory=QueryKey)
    block: Block = field(default_factory=Block)

    def __post_init__(self) -> None:
        if getattr(self.step_size.component, "needs_dt", False) and self.gate.name != "scalar":
            raise UserError(
                f"step_size: {self.step_size.name!r} is the time step of the scalar gate, but the gate is {self.gate.name!r}. "
                "Set gate: scalar, or another step size"
            )

    @property
    def name(self) -> str:
        return self.about.name

    @property
    def unit_keys(self) -> bool:
        """True where the keys that reach preconditioner and kernel have norm <= 1."""
        return self.qk.normalise_k == "l2" or bool(getattr(self.step_size.component, "unit_keys", False))

    def choices(self) -> dict[str, Choice]:
        """Axis -> choice."""
        return {axis: getattr(self, axis) for axis in AXES}

    def effective(self) -> dict[str, Any]:
        """Everything that changes the numbers, defaults written out; the name is not part of it.

        Without a preconditioner there is nothing to forget, so the forgetting is left out: specs that differ only there are one.
        """
        chosen = {axis: choice.effective() for axis, choice in self.choices().items()}
        if self.preconditioner.name == "none":
            chosen["forgetting"] = {"name": "none"}
        return {"kind": "recurrence", **chosen, "erase": self.erase, "qk": plain(self.qk), "block": plain(self.block)}

    def warnings(self) -> list[str]:
        """What a user should know before trusting a run of this spec: settings without effect, steps outside the stable range."""
        found = []
        if self.preconditioner.name == "none" and self.forgetting.name != "none":
            found.append(
                f"forgetting: {self.forgetting.name} has no effect: there is no preconditioner whose statistic it could forget"
            )
        largest = getattr(self.step_size.config, "range", (0.0, 1.0))[1]
        if self.preconditioner.name == "diagonal" and self.erase == "delta" and largest * self.preconditioner.config.x > 2:
            found.append(
                f"beta x can reach {largest * self.preconditioner.config.x:g}; the erase is stable only while beta x <= 2"
            )
        if self.erase == "delta" and not self.unit_keys:
            found.append("qk.normalise_k: none with erase: delta is unstable for keys longer than sqrt(2 / beta)")
        return found


MixerSpec = RecurrenceSpec | AttentionSpec
_ABOUT = ("name", "title", "equation", "source", "caveats")
_RECURRENT = (*AXES, "erase", "qk", "block")


def spec_from_mapping(card: Mapping[str, Any], path: str = "recurrence") -> MixerSpec:
    """A spec from a card's content. Unknown keys, components and options are errors that name the path.

    `kind: softmax` makes an attention card (only `block` and `rope_base`); anything else is a recurrence.
    """
    if not isinstance(card, Mapping):
        raise UserError(f"{path}: expected a card's content, got {shown(card)}")
    kind = card.get("kind", "recurrence")
    if kind not in ("recurrence", "softmax"):
        raise unknown("kind", kind, ("recurrence", "softmax"), join(path, "kind"))
    own = _RECURRENT if kind == "recurrence" else ("block", "rope_base")
    for key in card:
        if key not in (*_ABOUT, "kind", *own):
            raise unknown("key", key, (*_ABOUT, "kind", *own), join(path, key))
    about = build(About, {key: card[key] for key in _ABOUT if key in card}, path)
    block = _section(Block, card, "block", path)
    if kind == "softmax":
        rotary = build(_Rotary, {key: card[key] for key in ("rope_base",) if key in card}, path)
        return AttentionSpec(about, block, rotary.rope_base)
    if card.get("erase", "delta") not in ("delta", "none"):
        raise unknown("erase", card["erase"], ("delta", "none"), join(path, "erase"))
    defaults = {"gate": "none", "step_size": "sigmoid", "preconditioner": "none", "forgetting": "none"}
    chosen = {axis: choose(axis, card.get(axis, defaults[axis]), join(path, axis)) for axis in AXES}
    qk = _section(QueryKey, card, "qk", path)
    try:
        return RecurrenceSpec(about=about, **chosen, erase=card.get("erase", "delta"), qk=qk, block=block)
    except UserError as error:
        raise UserError(join(path, error)) from error


def _section(cls: type[S], card: Mapping[str, Any], key: str, path: str) -> S:
    """The settings under `key`, which may be left out or left empty."""
    content = card.get(key)
    return build(cls, {} if content is None else content, join(path, key))
