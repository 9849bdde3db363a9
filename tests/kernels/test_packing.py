"""Packed sequences equal separate calls: outputs, final states, every gradient. (Triton's kernels: tests/triton.)"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from deltalab.errors import UserError
from deltalab.kernels import delta_rule, diagonal_scan, hypergradient_scan, packing

LENGTHS = [3, 0, 41, 1, 17, 40, 0, 70, 2]
STARTS = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
T, N, H, K, V = STARTS[-1], len(LENGTHS), 2, 6, 5
SEPARATE = "reference"


def cut(function: Callable[..., tuple[Tensor, Tensor]], per_sequence: tuple[str, ...]) -> Callable[..., tuple[Tensor, Tensor]]:
    """One call per sequence, on slices, of the token loop."""

    def separately(**given: Any) -> tuple[Tensor, Tensor]:
        found = []
        for i in range(N):
            own = {}
            for name, x in given.items():
                if not isinstance(x, Tensor):
                    own[name] = x
                else:
                    own[name] = x[i : i + 1] if name in per_sequence else x[:, STARTS[i] : STARTS[i + 1]]
            found.append(function(**own, backend=SEPARATE))
        return torch.cat([o for o, _ in found], dim=1), torch.cat([last for _, last in found])

    return separately


def packed(function: Callable[..., tuple[Tensor, Tensor]], backend: str, dtype: torch.dtype = torch.int64) -> Any:
    starts = torch.tensor(STARTS, dtype=dtype)
    return lambda **given: function(**given, backend=backend, cu_seqlens=starts)


def drawn(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64)


@pytest.fixture(params=["reference", "torch", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("erase", [True, False])
@pytest.mark.parametrize("gate", ["none", "scalar", "channel"])
def test_delta_rule(backend, gate, erase, state, inputs, both, equal):
    given = inputs(1, T, H, K, V, gate, False, erase)
    given["initial_state"] = torch.randn(N, H, K, V, dtype=torch.float64) if state else None
    given |= {"erase": erase, "chunk_size": 16}
    equal(both(packed(delta_rule, backend), given), both(cut(delta_rule, ("initial_state",)), given))


@pytest.mark.parametrize("anchor", ["none", "number", "tensor"])
@pytest.mark.parametrize("forgets", [True, False])
def test_diagonal_scan(backend, forgets, anchor, both, equal):
    given = {"u": drawn(1, T, H, K), "initial": drawn(N, H, K), "log_decay": -drawn(1, T, H) if forgets else None}
    given["anchor"] = {"none": None, "number": 0.7, "tensor": drawn(N, H, K)}[anchor]
    if not forgets and anchor == "tensor":
        given["anchor"] = None  # it has no effect, and no gradient to compare
    equal(both(packed(diagonal_scan, backend), given), both(cut(diagonal_scan, ("initial", "anchor")), given))


@pytest.mark.parametrize(
    ("box", "clip"), [(None, "none"), ((0.4, 0.9), "token"), ((0.4, 0.9), "chunk")], ids=["open", "token", "chunk"]
)
@pytest.mark.parametrize("full", [True, False])
def test_hypergradient_scan(backend, box, clip, full, both, equal):
    given: dict[str, Any] = {"s": drawn(1, T, H, K) / K, "step": drawn(1, T, H), "initial": 2 * drawn(N, H, K)}
    if full:
        given |= {"aware": drawn(1, T, H), "log_decay": -drawn(1, T, H), "anchor": drawn(N, H, K)}
    else:
        given["step"] = 0.8
    given |= {"box": box, "clip": clip, "chunk_size": 16}
    equal(both(packed(hypergradient_scan, backend), given), both(cut(hypergradient_scan, ("initial", "anchor")), given))


def test_a_reset_does_not_leak_into_the_padding(backend, inputs, both, equal):
    """log_decay -inf at the first token of a sequence is what padding of a neighbour would be filled from."""
    given = inputs(1, T, H, K, V, "scalar", False)
    given["log_decay"][:, STARTS[2:-1]] = -torch.inf
    given |= {"chunk_size": 16}
    equal(both(packed(delta_rule, backend), given), both(cut(delta_rule, ()), given))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_both_index_types_and_the_final_dtype(dtype, inputs):
    given = {name: None if x is None else x.float() for name, x in inputs(1, T, H, K, V, "scalar", False).items()}
    o, last = packed(delta_rule, "torch", dtype)(**given)
    assert o.dtype == torch.float32 and last.dtype == torch.float32 and last.shape == (N, H, K, V)
    assert not last[1].any()  # an empty sequence keeps its state, zeros here


def test_a_fault_in_the_places_is_found(monkeypatch, inputs, both, equal):
    """One token of the collected output goes astray: the comparison must see it."""
    given = inputs(1, T, H, K, V, "scalar", False)
    right = packing._collect

    def faulty(parts: tuple[Tensor, ...], plan: packing.Packing) -> Tensor:
        x = right(parts, plan)
        x[:, [44, 45]] = x[:, [45, 44]]
        return x

    monkeypatch.setattr(packing, "_collect", faulty)
    with pytest.raises(AssertionError):
        equal(both(packed(delta_rule, "torch"), given), both(cut(delta_rule, ()), given))


def test_similar_lengths_share_a_call():
    plan = packing.Packing((0, *torch.tensor([100] * 50 + [90] * 50 + [4000] + [0] * 3).cumsum(0).tolist()))
    groups = plan.groups
    assert sorted(i for group in groups for i in group.members) == list(range(plan.sequences))
    assert [group.length for group in groups] == [4000, 100, 0]
    padded = sum(group.length * len(group.members) for group in groups)
    assert padded <= 1.25 * plan.starts[-1]


def test_the_table_of_chunks():
    plan = packing.Packing((0, 3, 3, 40))
    assert plan.chunks(16) == 4
    assert plan.table(16, torch.device("cpu")).tolist() == [0, 3, 3, 40, 0, 1, 1, 4, 0, 2, 2, 2]


def test_a_changed_tensor_is_read_again():
    starts = torch.tensor([0, 5, 9])
    assert packing.packing_of(starts).starts == (0, 5, 9)
    starts[1] = 4
    assert packing.packing_of(starts).starts == (0, 4, 9)


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([0, 5, 3, 8], r"cu_seqlens\[2\]: cumulative lengths never decrease, got 3 after 5"),
        ([1, 8], "cu_seqlens: expected to start at 0, got 1"),
        ([0, 7], "cu_seqlens: expected to end at T = 8, the number of tokens, got 7"),
        ([0], r"cu_seqlens: expected \[N\+1\] numbers with N at least 1"),
        ([[0, 8]], r"cu_seqlens: expected an int32 or int64 tensor \[N\+1\].*\[1, 2\]"),
        ([0.0, 8.0], r"cu_seqlens: expected an int32 or int64 tensor.*float32"),
    ],
)
def test_malformed_lengths(starts, message, inputs):
    with pytest.raises(UserError, match=message):
        delta_rule(**inputs(1, 8, 1, 4, 4, "none", False), cu_seqlens=torch.tensor(starts))


def test_packing_needs_a_batch_of_one_and_states_per_sequence(inputs):
    with pytest.raises(UserError, match="in a batch of 1, got B = 2"):
        delta_rule(**inputs(2, 8, 1, 4, 4, "none", False), cu_seqlens=torch.tensor([0, 8]))
    with pytest.raises(UserError, match=r"expected an int32 or int64 tensor \[N\+1\].*got \[0, 8\]"):
        delta_rule(**inputs(1, 8, 1, 4, 4, "none", False), cu_seqlens=[0, 8])
    with pytest.raises(UserError, match=r"initial_state: expected shape \[N,H,K,V\] = \[2, 1, 4, 4\], got \[1, 1, 4, 4\]"):
        delta_rule(**inputs(1, 8, 1, 4, 4, "none", True), cu_seqlens=torch.tensor([0, 3, 8]))
    with pytest.raises(UserError, match=r"initial: expected shape \[N,H,K\] = \[2, 1, 4\], got \[1, 1, 4\]"):
        diagonal_scan(drawn(1, 8, 1, 4), initial=drawn(1, 1, 4), cu_seqlens=torch.tensor([0, 3, 8]))
