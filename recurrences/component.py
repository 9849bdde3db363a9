"""What every component is: a small module with a typed config, an equation, a source, and its place on one axis.

A component registers itself under its axis and name:

    @component("gate", "scalar")
    class ScalarGate(Gate):
        "log a_t = -exp(A_log) softplus(W x_t + dt_bias)"

Its class docstring is its documentation (`deltalab describe scalar`): the first line is the equation, the rest says the initial
values in numbers, the source and the caveats. What passes between components of one layer is in `signals.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor, nn

from .. import plugins
from ..errors import UserError, shown, unknown
from ..strict import build, join, plain
from .settings import QueryKey
from .signals import Forget, GateOutput, Preconditioned, Step, Told

AXES = ("gate", "step_size", "preconditioner", "forgetting", "erase", "value_gain", "feedback")
DEFAULTS = {
    "gate": "none",
    "step_size": "sigmoid",
    "preconditioner": "none",
    "forgetting": "none",
    "erase": "delta",
    "value_gain": "one",
    "feedback": "none",
}
"""What a card that does not name an axis gets."""
_COMPONENTS: dict[str, dict[str, type[Component]]] = {axis: {} for axis in AXES}

STABLE = 2.0
"""The largest <k, write> at which an erase does not grow the memory: I - w k^T has the eigenvalue 1 - <k, w> >= -1."""
_BOUNDED_STEP = "valid is a bounded step size such as {name: sigmoid, range: [0, 2]}, or erase: none"

C = TypeVar("C", bound="type[Component]")


@dataclass(frozen=True)
class HeadShape:
    """The sizes a component is built for: model `width`, number of `heads`, key width and value width of one head."""

    width: int
    heads: int
    key: int
    value: int


class Chosen(Protocol):
    """What a component may ask of the recurrence that it stands in (`conflict`, `cautions`): the choices beside it, and what
    follows from them. `RecurrenceSpec` is one."""

    @property
    def gate(self) -> Choice: ...
    @property
    def step_size(self) -> Choice: ...
    @property
    def preconditioner(self) -> Choice: ...
    @property
    def forgetting(self) -> Choice: ...
    @property
    def erase(self) -> Choice: ...
    @property
    def value_gain(self) -> Choice: ...
    @property
    def feedback(self) -> Choice: ...
    @property
    def substeps(self) -> int: ...
    @property
    def qk(self) -> QueryKey: ...
    @property
    def erases(self) -> bool:
        """True where the memory is read with the key before it is written."""

    @property
    def unit_keys(self) -> bool:
        """True where the keys that reach preconditioner and kernel have norm <= 1."""

    @property
    def limits_step(self) -> bool:
        """True where the preconditioner keeps a write stable, whatever beta and the key are."""


class Component(nn.Module):
    """One choice on one axis. Parameters of a component are never decayed (recurrences.md, section 2).

    A component that owns parameters itself (not through `Projection`) sets them in `initialise(generator)`.
    """

    axis: ClassVar[str]
    name: ClassVar[str]

    @dataclass(frozen=True)
    class Config:
        """No options."""

    def __init__(self, config: Any, shape: HeadShape) -> None:
        super().__init__()
        self.config = config
        self.shape = shape

    @classmethod
    def equation(cls) -> str:
        """The first line of the docstring."""
        return (cls.__doc__ or "").strip().splitlines()[0]

    @classmethod
    def conflict(cls, config: Any, spec: Chosen) -> str | None:
        """Why this choice cannot stand beside the spec's other choices, and what would; None where it can."""
        return None

    @classmethod
    def cautions(cls, config: Any, spec: Chosen) -> list[str]:
        """What a user should know before trusting a run: options without effect, steps outside their stable range."""
        return []

    def flops_per_token(self) -> int:
        """Multiply-adds of a token beyond those of the projections, for the cost estimate."""
        return 0


class Gate(Component):
    """How the state forgets: forward(x [B,T,D]) -> GateOutput."""

    axis = "gate"
    per_channel: ClassVar[bool] = False
    """True where it gives one decay per key channel instead of one per head."""
    has_dt: ClassVar[bool] = False
    """True where it has a time step that a write may share (`step_size: dt`)."""

    def decay(self, output: GateOutput, step: Step) -> Tensor | None:
        """The state's log_decay once the step size is known: None, [B,T,H] or [B,T,H,K]."""
        return output.log_decay


class StepSize(Component):
    """How far a write goes: forward(x [B,T,D], key [B,T,H,K], GateOutput) -> Step."""

    axis = "step_size"
    unit_keys: ClassVar[bool] = False
    """True where the key that comes out has norm <= 1 whatever came in."""
    reads_key: ClassVar[bool] = True
    """False where the step does not depend on the key, which is handed on as it came: then it may come in half precision."""
    needs_position: ClassVar[bool] = False
    """True where forward takes a fourth argument: the number of tokens before this call, [B] int64."""

    @classmethod
    def largest(cls, config: Any) -> float:
        """The largest beta |k|^2 it can give to a unit key (or to any key, where `unit_keys`)."""
        return 1.0

    @classmethod
    def cautions(cls, config: Any, spec: Chosen) -> list[str]:
        largest = cls.largest(config)
        if not spec.erases or spec.limits_step or largest <= STABLE:
            return []
        reach = "is not bounded" if math.isinf(largest) else f"can reach {largest:.4g}"
        high = getattr(config, "range", (0.0, 0.0))[1]
        valid = f"valid is a range up to {STABLE * high / largest:.4g}" if 0 < largest < math.inf and high else _BOUNDED_STEP
        return [f"beta |k|^2 {reach}; the erase is stable only while it is <= 2: {valid}"]


class Preconditioner(Component):
    """How the step differs per feature: forward(Told, statistic) -> Preconditioned.

    Most preconditioners multiply each channel by a number: subclass `multipliers.Multiplier`, which has the controls, the
    sides and the normalisers, and write `multiplier` alone.
    """

    axis = "preconditioner"
    has_statistic: ClassVar[bool] = True
    """False where nothing is carried from token to token, so that there is nothing to forget."""

    @classmethod
    def limits_step(cls, config: Any) -> bool:
        """True where the read key meets at most 1 of what is written, <k, write> <= 1, whatever beta and the key are."""
        return False

    @classmethod
    def limits_key(cls, config: Any) -> bool:
        """True where it meets at most beta of it, <k, write> <= beta, however long the key is."""
        return cls.limits_step(config)

    def initial_statistic(self, batch: int) -> Tensor | None:
        """The statistic before the first token, [B,H,K] or [B,H,K,K], float32 or wider; None where there is none."""
        return None

    def forward(self, told: Told, statistic: Tensor | None) -> Preconditioned:
        raise NotImplementedError


class Forgetting(Component):
    """How the preconditioner's statistic forgets: forward(x [B,T,D], the state's log_decay) -> Forget."""

    axis = "forgetting"

    @classmethod
    def smallest(cls, config: Any) -> float:
        """The smallest gamma it can give."""
        return 0.0

    def forward(self, x: Tensor, state_log_decay: Tensor | None) -> Forget:
        raise NotImplementedError


class Erase(Component):
    """Which key is read before writing: forward(x [B,T,D], key [B,T,H,K]) -> read key [B,T,H,K]."""

    axis = "erase"
    reads: ClassVar[bool] = True
    """False where nothing is erased, so that the rule is plain linear attention."""


class ValueGain(Component):
    """What scales the value: forward(x [B,T,D], the key as it came [B,T,H,K], value [B,T,H,V]) -> value."""

    axis = "value_gain"


class Feedback(Component):
    """What the output takes back: forward(query, key) -> query, all [B,T,H,K]; `key` is the one that is read."""

    axis = "feedback"


@dataclass(frozen=True)
class Choice:
    """A component and its options: one coordinate of a recurrence."""

    component: type[Component]
    config: Any

    @property
    def name(self) -> str:
        return self.component.name

    def build(self, shape: HeadShape) -> Any:
        """The module."""
        return self.component(self.config, shape)

    def effective(self) -> dict[str, Any]:
        """Name and every option, defaults written out."""
        return {"name": self.name, **plain(self.config)}

    def __str__(self) -> str:
        default = self.component.Config()
        changed = [
            f"{field.name}={plain(getattr(self.config, field.name))}"
            for field in dataclasses.fields(self.config)
            if getattr(self.config, field.name) != getattr(default, field.name)
        ]
        return f"{self.name}({', '.join(changed)})" if changed else self.name


def component(axis: str, name: str) -> Callable[[C], C]:
    """Register a class as the choice `name` on `axis`. `UserError` where the name is taken by another class."""
    if axis not in AXES:
        raise unknown("axis", axis, AXES)

    def register(cls: C) -> C:
        held = _COMPONENTS[axis].get(name)
        # A module that is imported twice (under two names, or reloaded) brings the same class again.
        if held is not None and (held.__module__, held.__qualname__) != (cls.__module__, cls.__qualname__):
            raise UserError(
                f"{axis} {name!r} of {cls.__module__} is already registered, by {held.__module__}.{held.__qualname__}; "
                "give it another name"
            )
        _check_declaration(cls, axis)
        cls.axis, cls.name = axis, name
        _COMPONENTS[axis][name] = cls
        return cls

    return register


def _check_declaration(cls: type[Component], axis: str) -> None:
    """A component that cannot be used says so when it is declared, not in the middle of a study."""
    base = _BASES[axis]
    where = f"{cls.__module__}.{cls.__qualname__}"
    if not issubclass(cls, base):
        raise UserError(f"{axis} {where}: is no {base.__name__}; derive it from deltalab.recurrences.{base.__name__}")
    if not (cls.__dict__.get("__doc__") or "").strip():
        raise UserError(f"{axis} {where}: has no docstring; its first line is the equation that `deltalab describe` prints")
    if not dataclasses.is_dataclass(cls.Config) or not cls.Config.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise UserError(f"{axis} {where}: its Config is no frozen dataclass")
    try:
        cls.Config()
    except TypeError as error:
        raise UserError(f"{axis} {where}: every field of its Config needs a default: {error}") from error


_BASES: dict[str, type[Component]] = {
    base.axis: base for base in (Gate, StepSize, Preconditioner, Forgetting, Erase, ValueGain, Feedback)
}


def components(axis: str) -> Mapping[str, type[Component]]:
    """Name -> class of every choice on `axis`, those of plug-ins included."""
    if axis not in AXES:
        raise unknown("axis", axis, AXES)
    plugins.attempt()
    return dict(_COMPONENTS[axis])


def origin(cls: type[Component]) -> str:
    """Where a component comes from: `deltalab`, or a plug-in's package, version and digest."""
    return plugins.origin(cls.__module__)


def choose(axis: str, value: object, path: str = "") -> Choice:
    """A Choice from what a user wrote: `sigmoid`, or `{name: sigmoid, range: [0, 2]}`."""
    if isinstance(value, Choice):
        return value
    path = path or axis
    problems = plugins.attempt()
    # YAML 1.1 reads a bare `none` as text but `null`/`~` as None: both say that nothing is chosen.
    options = dict(value) if isinstance(value, Mapping) else {"name": "none" if value is None else value}
    if "name" not in options:
        raise UserError(f"{join(path, 'name')}: missing. Valid: {', '.join(sorted(_COMPONENTS[axis]))}")
    name = options.pop("name")
    found = _COMPONENTS[axis].get(name) if isinstance(name, str) else None
    if found is None:
        if problems:  # of a plug-in that may be the one that has it
            raise UserError(f"{path}: {shown(name)}: {problems[0]}")
        raise unknown(axis.replace("_", " "), name, _COMPONENTS[axis], path)
    return Choice(found, build(found.Config, options, path))
