"""`deltalab.kernels` against the naive forms of flash-linear-attention, in float32, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from deltalab.kernels import delta_rule, gram_solve

from .agreement import Function, Tensors, assert_agree
from .fla_naive import OPERATORS
from .kernel_cases import CASES, CHUNK, comba, each, outputs, preconditioned

BACKENDS = ("reference", "torch")
Options = dict[str, Any]


@pytest.fixture(params=BACKENDS)
def options(request: pytest.FixtureRequest) -> Options:
    return {"backend": request.param, "chunk_size": CHUNK}


def test_every_operator_has_a_case() -> None:
    assert set(OPERATORS) == {name.split(",")[0].split(" ")[0] for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_is_its_naive_form(name: str, options: Options) -> None:
    case = CASES[name]
    errors = assert_agree(lambda z: case.ours(z, options), case.oracle, case.inputs())
    print(f"worst relative error: {max(errors.values()):.1e}")


def ours(name: str, options: Options, **changed: Callable[[Tensor], Tensor]) -> Function:
    """The case's own call with some of its inputs changed on the way in."""

    def function(z: Tensors) -> Tensors:
        return CASES[name].ours({key: changed.get(key, lambda x: x)(value) for key, value in z.items()}, options)

    return function


def gdn(z: Tensors, options: Options, **changed: Any) -> Tensors:
    """Gated delta rule as `kernel_cases.delta` calls it, with some arguments of the kernel changed."""
    key, beta = z["k"], z["beta"]
    arguments = {"q": z["q"], "read_key": key, "write_key": each(key, beta), "v": z["v"], "log_decay": z["g"]}
    return outputs(*delta_rule(**{**arguments, "initial_state": z["state"], **options, **changed}))


def later(x: Tensor) -> Tensor:
    """x one token late."""
    return x.roll(1, dims=1)


def swapped(x: Tensor) -> Tensor:
    """The two substeps of every token exchanged."""
    return x.unflatten(1, (-1, 2)).flip(2).flatten(1, 2)


def statistic_without_its_token(z: Tensors, options: Options) -> Tensors:
    """What a token adds to the statistic comes a token late."""
    late: Mapping[str, Tensor] = {**z, "beta_statistic": later(z["beta_statistic"])}
    return preconditioned(normalise=False, decay="g_channel")(late, options)


def unweighted_gram(z: Tensors, options: Options) -> Tensors:
    """The step size in the memory alone."""
    k, gram = z["k"], z["factor"] @ z["factor"].mT
    reader, gram = gram_solve(z["q"], k, None, z["g"], ridge=z["ridge"], initial=gram, **options)
    written = {"initial_state": z["state"], "erase": False, "scale": 1.0}
    return outputs(*delta_rule(reader, None, each(k, z["beta"]), z["v"], z["g"], **written, **options), gram)


FAULTS: dict[str, tuple[str, Callable[[Options], Function]]] = {
    "error before the decay": ("gated_delta_rule", lambda o: lambda z: gdn(z, o, read_key=each(z["k"], (-z["g"]).exp()))),
    "error before the decay, comba": ("comba", lambda o: lambda z: comba(z, o, error_before_decay=True)),
    "no step size": ("gated_delta_rule", lambda o: lambda z: gdn(z, o, write_key=each(z["k"], 1 + 0 * z["beta"]))),
    "step size twice": ("delta_rule", lambda o: ours("delta_rule", o, beta=torch.square)),
    "step size on the read key": (
        "gated_delta_rule",
        lambda o: lambda z: gdn(z, o, read_key=each(z["k"], z["beta"]), write_key=z["k"]),
    ),
    "step size a token late": ("kda", lambda o: ours("kda", o, beta=later)),
    "step size off by one in ten thousand": ("kda", lambda o: ours("kda", o, beta=lambda b: 1.0001 * b)),
    "no scale": ("gated_delta_rule", lambda o: lambda z: gdn(z, o, scale=1.0)),
    "no erase": ("gated_delta_rule", lambda o: lambda z: gdn(z, o, erase=False)),
    "no initial state": ("gla", lambda o: ours("gla", o, state=lambda s: 0 * s)),
    "decay a token late": ("simple_gla", lambda o: ours("simple_gla", o, g=later)),
    "decays of the wrong heads": ("simple_gla", lambda o: ours("simple_gla", o, g=lambda g: g.flip(-1))),
    "channels of the query in another order": ("gla", lambda o: ours("gla", o, q=lambda q: q.flip(-1))),
    "substeps in another order": ("gated_delta_product 2", lambda o: ours("gated_delta_product 2", o, k=swapped)),
    "no gradient for the step size": ("delta_rule", lambda o: ours("delta_rule", o, beta=lambda b: b.detach() + 0 * b)),
    "ridge a tenth too large": ("mesa_net", lambda o: ours("mesa_net", o, ridge=lambda r: 1.1 * r)),
    "Gram matrix without the step size": ("mesa_net", lambda o: lambda z: unweighted_gram(z, o)),
    "statistic without its token": ("precond_kda", lambda o: lambda z: statistic_without_its_token(z, o)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, options: Options) -> None:
    name, plant = FAULTS[fault]
    case = CASES[name]
    with pytest.raises(AssertionError, match="relative error above"):
        assert_agree(plant(options), case.oracle, case.inputs())
