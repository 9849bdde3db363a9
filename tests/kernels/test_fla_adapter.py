"""The adapter to flash-linear-attention, on its naive forms in the place of its GPU kernels: the same arguments, on a CPU."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Callable
from importlib.metadata import distribution
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from deltalab.errors import UserError
from deltalab.kernels import backends, delta_rule, fla, resolve_backend

from ..oracles.fla_naive import naive

B, T, H, K, V = 2, 21, 2, 6, 5


def plain_delta_rule(scale: float, **given: Any) -> tuple[Tensor, Tensor]:
    """Its naive form wants heads before time, and scales by K**-0.5 on its own."""
    state = given.pop("initial_state")
    q, k, v, beta = (given[name].float().transpose(1, 2) for name in ("q", "k", "v", "beta"))
    o, last = naive("delta_rule")(q * (scale * K**0.5), k, v, beta, initial_state=state)
    return o.transpose(1, 2).to(given["v"].dtype), last


def gla(scale: float, g: Tensor, q: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    o, state = naive("gla")(gk=g, q=q * (scale * K**0.5), **given)
    return o, state


def simple_gla(g: Tensor | None, q: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    o, state = naive("simple_gla")(g=q.new_zeros(q.shape[:3]) if g is None else g, q=q, **given)
    return o, state


TABLE = fla.Kernels(plain_delta_rule, naive("gated_delta_rule"), naive("kda"), simple_gla, gla)


@pytest.fixture
def adapted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Tensor, Tensor]]:
    """`delta_rule(backend="fla")` with that table."""
    monkeypatch.setattr(fla, "available", lambda device: True)
    monkeypatch.setattr(fla, "kernels", lambda: TABLE)
    return lambda **given: delta_rule(**given, backend="fla")


def given_to(gate: str, erase: bool, state: bool) -> dict[str, Any]:
    shape = {"none": None, "scalar": (B, T, H), "channel": (B, T, H, K)}[gate]
    key = normalize(torch.randn(B, T, H, K), dim=-1)
    return {
        "q": torch.randn(B, T, H, K),
        "read_key": key if erase else None,
        "write_key": None if erase else key,
        "beta": torch.rand(B, T, H) if erase else None,
        "v": torch.randn(B, T, H, V),
        "log_decay": None if shape is None else -2 * torch.rand(shape),
        "initial_state": torch.randn(B, H, K, V) if state else None,
        "scale": 0.3,
        "erase": erase,
    }


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("erase", [True, False])
@pytest.mark.parametrize("gate", ["none", "scalar", "channel"])
def test_the_same_function(gate, erase, state, adapted, both, equal):
    given = given_to(gate, erase, state)
    equal(both(adapted, given), both(lambda **x: delta_rule(**x, backend="reference"), given), tolerance=1e-5)


@pytest.mark.parametrize("state", [True, False])
def test_sixteen_bit_tensors_take_the_plain_delta_rule(state, adapted):
    given = {
        name: x.half() if isinstance(x, Tensor) and name != "initial_state" else x
        for name, x in given_to("none", True, state).items()
    }
    o, last = adapted(**given)
    expected, final = delta_rule(**given, backend="reference")
    assert o.dtype == torch.float16 and last.dtype == torch.float32
    torch.testing.assert_close(o, expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(last, final, rtol=2e-3, atol=2e-3)


def test_autocast_decides_what_its_products_take(monkeypatch, adapted):
    """Its kernels refuse float32; a layer under autocast hands over float32."""
    seen = {}

    def gated(**given: Any) -> tuple[Tensor, Tensor]:
        seen.update({name: x.dtype for name, x in given.items() if isinstance(x, Tensor)})
        return TABLE.gated_delta_rule(**given)

    monkeypatch.setattr(fla, "kernels", lambda: TABLE._replace(gated_delta_rule=gated))
    given = given_to("scalar", True, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, last = adapted(**given)
        expected, final = delta_rule(**given, backend="reference")
    assert {name: str(dtype)[6:] for name, dtype in seen.items()} == {
        **dict.fromkeys(("q", "k", "v"), "bfloat16"), **dict.fromkeys(("g", "beta", "initial_state"), "float32")
    }  # fmt: skip
    assert (o.dtype, expected.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(o.float(), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(last, final, rtol=0.05, atol=0.05)


def test_a_reset_is_finite(adapted, both, equal):
    given = given_to("scalar", True, True)
    given["log_decay"][:, 7] = -torch.inf
    equal(both(adapted, given), both(lambda **x: delta_rule(**x, backend="reference"), given), tolerance=1e-5)


def test_a_fault_is_found(monkeypatch, adapted, both, equal):
    """A step size a hundredth too small: the comparison must fail."""
    wrong = TABLE._replace(gated_delta_rule=lambda **x: TABLE.gated_delta_rule(**{**x, "beta": 0.99 * x["beta"]}))
    monkeypatch.setattr(fla, "kernels", lambda: wrong)
    given = given_to("scalar", True, True)
    with pytest.raises(AssertionError):
        equal(both(adapted, given), both(lambda **x: delta_rule(**x, backend="reference"), given), tolerance=1e-5)


def test_lengths_are_handed_on(monkeypatch, adapted):
    seen = {}

    def separately(**given: Any) -> tuple[Tensor, Tensor]:
        starts = given.pop("cu_seqlens")
        seen["starts"] = starts
        states = given.pop("initial_state")
        found = []
        for i, (a, b) in enumerate(itertools.pairwise(starts)):
            own = {name: x[:, a:b] if isinstance(x, Tensor) else x for name, x in given.items()}
            found.append(TABLE.gated_delta_rule(**own, initial_state=states[i : i + 1]))
        return torch.cat([o for o, _ in found], 1), torch.cat([last for _, last in found])

    monkeypatch.setattr(fla, "kernels", lambda: TABLE._replace(gated_delta_rule=separately))
    given = {name: x[:1] if isinstance(x, Tensor) else x for name, x in given_to("scalar", True, False).items()}
    given |= {"initial_state": torch.randn(2, H, K, V), "cu_seqlens": torch.tensor([0, 8, T])}
    o, last = adapted(**given)
    expected, final = delta_rule(**given, backend="reference")
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(last, final)
    assert seen["starts"] is given["cu_seqlens"]


def test_what_it_does_not_compute(adapted):
    given = given_to("scalar", True, True)
    given |= {"write_key": 0.5 * given["read_key"], "beta": None}
    with pytest.raises(UserError, match="'fla' writes along the key that it reads.*hand over `beta`.*auto, torch, triton"):
        adapted(**given)
    wide = {name: x.double() if isinstance(x, Tensor) else x for name, x in given_to("scalar", True, True).items()}
    with pytest.raises(UserError, match="'fla' works in float32, got float64"):
        adapted(**wide)
    long = torch.zeros(1, 2, 1, 300)
    with pytest.raises(UserError, match="'fla' serves heads of at most 256, got 300 x 300"):
        adapted(q=long, read_key=long, write_key=None, v=long, beta=torch.zeros(1, 2, 1))


def test_it_is_for_gpus():
    assert "fla" not in backends()
    with pytest.raises(UserError, match="'fla' cannot work on cpu .it needs an NVIDIA GPU and the package flash-lin"):
        resolve_backend("fla", "cpu")


def test_beta_is_the_write_key_of_every_backend(both, equal, inputs):
    given = inputs(1, 9, 2, 4, 3, "scalar", True)
    given |= {"write_key": None, "beta": torch.rand(1, 9, 2, dtype=torch.float64)}
    found = both(lambda **x: delta_rule(**x, backend="torch"), given)
    spelled = both(
        lambda beta, **x: delta_rule(**{**x, "write_key": beta[..., None] * x["read_key"]}, backend="reference"), given
    )
    equal(found, spelled)
    with pytest.raises(UserError, match="write_key: expected None beside beta"):
        delta_rule(**{**given, "write_key": given["q"]})


@pytest.mark.parametrize("name", fla.Kernels._fields)
def test_its_kernels_have_these_arguments(name):
    """Read from the installed source: importing it takes seconds and binds other packages' functions to the GPU."""
    text = distribution("fla-core").locate_file(f"fla/ops/{name}/chunk.py").read_text()  # type: ignore[attr-defined]
    found = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == f"chunk_{name}"]
    arguments = {argument.arg for argument in found[0].args.args}
    used = {"q", "k", "v", "scale", "initial_state", "output_final_state", "cu_seqlens"}
    used |= set() if name == "delta_rule" else {"g"}
    used |= {"beta"} if name in ("delta_rule", "gated_delta_rule", "kda") else set()
    assert used <= arguments
