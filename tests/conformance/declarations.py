"""What a component and a card say of themselves, and whether it is true."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deltalab.recurrences import Mixer, spec_from_mapping
from deltalab.recurrences.component import DEFAULTS

from .laboratory import CheckError, Subject, mixer_of, require, sizes, tokens

UNDOCUMENTED = (*set(DEFAULTS.values()) - {"sigmoid", "delta"},)
"""Names of choices that say that nothing is chosen."""


def check_documentation(subject: Subject) -> None:
    """Equation and source are given.

    A card has both as keys; a component's docstring begins with its equation and says `Source: ...`.
    """
    spec: Any = subject.spec
    if not subject.axis:
        require(bool(spec.about.name.strip()), "the card has no name")
        for part in ("equation", "source"):
            require(bool(getattr(spec.about, part).strip()), f"the card {spec.name!r} does not say its {part}")
    choices = spec.choices() if subject.recurrent else {}
    for axis, choice in choices.items():
        if (subject.axis and axis != subject.axis) or choice.name in UNDOCUMENTED:
            continue
        doc = (choice.component.__doc__ or "").strip()
        first, _, rest = doc.partition("\n")
        require(bool(first.strip()), f"{axis} {choice.name}: the docstring's first line, which is its equation, is empty")
        require("Source:" in rest, f"{axis} {choice.name}: its docstring does not say where it comes from (`Source: ...`)")


@torch.no_grad()
def check_round_trip(subject: Subject) -> None:
    """`effective()` is plain data that gives the same mixer back.

    It is what a trial is frozen as, and what its worker builds the model from.
    """
    effective = subject.spec.effective()
    try:
        text = json.dumps(effective, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckError(f"effective() is no JSON-able data: {error}") from None
    spec = spec_from_mapping({"name": subject.spec.name, **json.loads(text)})
    require(spec.effective() == effective, "the spec that is built from effective() is another one")
    one = mixer_of(subject, lively=False, short_conv=4)
    width, heads = sizes(subject.spec)[0]
    options = {"head_width": one.block.head_width, "short_conv": 4}
    other = Mixer(spec, width=width, heads=heads, seed=0, **options).double()  # type: ignore[arg-type]
    x = tokens(one, 7)
    require(torch.equal(one(x), other(x)), "the mixer that is built from effective() computes something else")


@torch.no_grad()
def check_contract(subject: Subject) -> None:
    """What passes between components has the shapes and types of its axis.

    And what a class says of itself is true: per_channel, has_dt, unit_keys, largest, has_statistic.
    """
    for bfloat16 in (False, True):
        mixer = mixer_of(subject, lively=not bfloat16)
        mixer = mixer.float() if bfloat16 else mixer
        calls: list[tuple[str, nn.Module, tuple[Any, ...], Any]] = []
        _listen(mixer, calls)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            try:
                mixer(tokens(mixer, 5), state=mixer.initial_state(2))
            except Exception as error:
                _check_calls(calls)  # the more telling failure, where there is one
                raise CheckError(f"the mixer cannot be run: {type(error).__name__}: {error}") from error
        _check_calls(calls)


def _listen(mixer: Any, calls: list[tuple[str, nn.Module, tuple[Any, ...], Any]]) -> None:
    """Note every call of a component: axis, module, arguments, result."""
    for axis in _CONTRACTS:
        getattr(mixer, axis).register_forward_hook(
            lambda module, given, output, axis=axis: calls.append((axis, module, given, output))
        )


def _check_calls(calls: list[tuple[str, nn.Module, tuple[Any, ...], Any]]) -> None:
    for axis, module, given, output in calls:
        _CONTRACTS[axis](module, given, output)


def _tensor(words: str, value: object, shape: tuple[int, ...], wide: bool = True) -> None:
    require(isinstance(value, Tensor), f"{words}: expected a tensor, got {type(value).__name__}")
    assert isinstance(value, Tensor)
    require(tuple(value.shape) == shape, f"{words}: shape {tuple(value.shape)}, expected {shape}")
    narrow = value.dtype in (torch.bfloat16, torch.float16)
    require(
        value.is_floating_point() and not (wide and narrow), f"{words}: {value.dtype}, expected float32 or wider (signals.wide)"
    )


def _gate(module: Any, given: tuple[Any, ...], output: Any) -> None:
    require(hasattr(output, "log_decay") and hasattr(output, "dt"), f"gate: returns {type(output).__name__}, expected GateOutput")
    per_head = (*given[0].shape[:2], module.shape.heads)
    if output.log_decay is not None:
        shape = (*per_head, module.shape.key) if module.per_channel else per_head
        _tensor(f"gate: log_decay (per_channel is {module.per_channel})", output.log_decay, shape)
    require(module.has_dt == (output.dt is not None), f"gate: has_dt is {module.has_dt}, but dt is {type(output.dt).__name__}")
    if output.dt is not None:
        _tensor("gate: dt", output.dt, per_head)
        require(bool((output.dt > 0).all()), "gate: dt is not positive")


def _step_size(module: Any, given: tuple[Any, ...], output: Any) -> None:
    key = given[1]
    require(hasattr(output, "beta") and hasattr(output, "key"), f"step_size: returns {type(output).__name__}, expected Step")
    _tensor("step_size: key", output.key, tuple(key.shape))
    for name in ("beta", "value_gain"):
        if getattr(output, name) is not None:
            _tensor(f"step_size: {name}", getattr(output, name), tuple(key.shape[:3]))
    if output.log_decay is not None:
        _tensor("step_size: log_decay", output.log_decay, tuple(key.shape))
    norm, slack = output.key.float().norm(dim=-1), 1 + 1e-3
    if module.unit_keys:
        require(float(norm.max()) <= slack, f"step_size: unit_keys is True, but a key of norm {float(norm.max()):.3g} comes out")
    # `largest` speaks of keys of norm 1: longer ones are the user's own (qk.normalise_k: none), and have their own warning.
    beta = torch.ones_like(norm) if output.beta is None else output.beta.float()
    reached = float((beta * norm.clamp(max=1.0).square()).max())
    most = module.largest(module.config)
    require(reached <= most * slack, f"step_size: beta |k|^2 reaches {reached:.3g}, but `largest` says {most:g}")


def _preconditioner(module: Any, given: tuple[Any, ...], output: Any) -> None:
    told = given[0]
    require(
        hasattr(output, "statistic") and hasattr(output, "query"),
        f"preconditioner: returns {type(output).__name__}, expected Preconditioned",
    )
    _tensor("preconditioner: key", output.key, tuple(told.key.shape))
    _tensor("preconditioner: query", output.query, tuple(told.query.shape))
    initial = module.initial_statistic(len(told.x))
    if not module.has_statistic:
        require(initial is None, "preconditioner: has_statistic is False, but there is an initial statistic")
    require((initial is None) == (output.statistic is None), "preconditioner: the statistic does not go on from call to call")
    if initial is not None:
        _tensor("preconditioner: the initial statistic", initial, (len(told.x), *initial.shape[1:]))
        _tensor("preconditioner: the statistic", output.statistic, tuple(initial.shape))


def _forgetting(module: Any, given: tuple[Any, ...], output: Any) -> None:
    require(
        hasattr(output, "gain") and hasattr(output, "anchor"), f"forgetting: returns {type(output).__name__}, expected Forget"
    )
    per_head = (*given[0].shape[:2], module.shape.heads)
    for name in ("log_decay", "gain"):
        if getattr(output, name) is not None:
            _tensor(f"forgetting: {name}", getattr(output, name), per_head)
    require(output.anchor in ("zero", "one", "initial"), f"forgetting: anchor is {output.anchor!r}; valid: zero, one, initial")


def _erase(module: Any, given: tuple[Any, ...], output: Any) -> None:
    _tensor("erase: the read key", output, tuple(given[1].shape))


def _value_gain(module: Any, given: tuple[Any, ...], output: Any) -> None:
    _tensor("value_gain: the value", output, tuple(given[2].shape))


def _feedback(module: Any, given: tuple[Any, ...], output: Any) -> None:
    _tensor("feedback: the query", output, tuple(given[0].shape))


_CONTRACTS: dict[str, Callable[[Any, tuple[Any, ...], Any], None]] = {
    "gate": _gate,
    "step_size": _step_size,
    "preconditioner": _preconditioner,
    "forgetting": _forgetting,
    "erase": _erase,
    "value_gain": _value_gain,
    "feedback": _feedback,
}
CHECKS = (check_documentation, check_contract, check_round_trip)
