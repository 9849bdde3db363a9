"""What every component is: a small module with a typed config, an equation, a source, and its place on one axis.

A component registers itself under its axis and name:

    @component("gate", "scalar")
    class ScalarGate(Gate):
        "log a_t = -exp(A_log) softplus(W x_t + dt_bias)"

Its class docstring is its documentation (`deltalab describe scalar`): the first line is the equation, the rest says the initial
values in numbers, the source and the caveats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

from torch import Tensor, nn

from ..errors import UserError, unknown
from ..strict import build, join, plain

AXES = ("gate", "step_size", "preconditioner", "forgetting")
_COMPONENTS: dict[str, dict[str, type[Component]]] = {axis: {} for axis in AXES}

C = TypeVar("C", bound="type[Component]")


@dataclass(frozen=True)
class HeadShape:
    """The sizes a component is built for: model `width`, number of `heads`, key width and value width of one head."""

    width: int
    heads: int
    key: int
    value: int


class Component(nn.Module):
    """One choice on one axis. Parameters of a component are never decayed (recurrences.md, section 2)."""

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


class GateOutput(NamedTuple):
    """`log_decay` <= 0: None, [B,T,H] or [B,T,H,K]; `dt` [B,T,H] > 0 where the gate has a time step that a write may share."""

    log_decay: Tensor | None
    dt: Tensor | None = None


class Step(NamedTuple):
    """`key` [B,T,H,K]: the key that is read and written; `beta` [B,T,H] (None: 1); `value_gain` [B,T,H] times v (None: 1)."""

    key: Tensor
    beta: Tensor | None = None
    value_gain: Tensor | None = None


class Forget(NamedTuple):
    """How a statistic forgets: `log_decay` [B,T,H] <= 0 (None: never); `gain` [B,T,H] scales what a token adds (None: 1)."""

    log_decay: Tensor | None = None
    gain: Tensor | None = None


class Gate(Component):
    """How the state forgets: forward(x [B,T,D]) -> GateOutput."""

    axis = "gate"


class StepSize(Component):
    """How far a write goes: forward(x [B,T,D], key [B,T,H,K], GateOutput) -> Step."""

    axis = "step_size"
    unit_keys: ClassVar[bool] = False
    """True where the key that comes out has norm <= 1 whatever came in."""
    needs_dt: ClassVar[bool] = False
    """True where the step is the gate's own dt."""


class Preconditioner(Component):
    """How the step differs per feature: forward(x, key, beta, Forget, statistic) -> (multiplier [B,T,H,K] | None, statistic)."""

    axis = "preconditioner"

    def initial_statistic(self, batch: int) -> Tensor | None:
        """The statistic before the first token, [B,H,K] float32, or None where there is none."""
        return None


class Forgetting(Component):
    """How the preconditioner's statistic forgets: forward(x [B,T,D]) -> Forget."""

    axis = "forgetting"


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
    """Register a class as the choice `name` on `axis`."""
    if axis not in AXES:
        raise unknown("axis", axis, AXES)

    def register(cls: C) -> C:
        if name in _COMPONENTS[axis]:
            raise ValueError(f"{axis} {name!r} is already registered, by {_COMPONENTS[axis][name].__qualname__}")
        cls.axis, cls.name = axis, name
        _COMPONENTS[axis][name] = cls
        return cls

    return register


def components(axis: str) -> Mapping[str, type[Component]]:
    """Name -> class of every choice on `axis`."""
    if axis not in AXES:
        raise unknown("axis", axis, AXES)
    return dict(_COMPONENTS[axis])


def choose(axis: str, value: object, path: str = "") -> Choice:
    """A Choice from what a user wrote: `sigmoid`, or `{name: sigmoid, range: [0, 2]}`."""
    if isinstance(value, Choice):
        return value
    path = path or axis
    # YAML 1.1 reads a bare `none` as text but `null`/`~` as None: both say that nothing is chosen.
    options = dict(value) if isinstance(value, Mapping) else {"name": "none" if value is None else value}
    if "name" not in options:
        raise UserError(f"{join(path, 'name')}: missing. Valid: {', '.join(sorted(_COMPONENTS[axis]))}")
    name = options.pop("name")
    found = _COMPONENTS[axis].get(name) if isinstance(name, str) else None
    if found is None:
        raise unknown(axis.replace("_", " "), name, _COMPONENTS[axis], path)
    return Choice(found, build(found.Config, options, path))
