"""The preconditioners' scans: chunk forms and the lean token loop against the definitions, and against the mathematics."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from deltalab.kernels import delta_rule, diagonal_scan, hypergradient_scan, scans

LENGTHS = [1, 2, 63, 64, 65, 130]
F64 = torch.float64


def diagonal_inputs(T, gated=True, initial=True, dtype=F64):
    return {
        "u": torch.rand(2, T, 3, 5, dtype=dtype),
        "log_decay": -2 * torch.rand(2, T, 3, dtype=dtype) if gated else None,
        "initial": torch.rand(2, 3, 5, dtype=dtype) if initial else None,
    }


def hypergradient_inputs(T, aware=True, gated=True, step=True, dtype=F64):
    per_token = (2, T, 3)
    return {
        "s": normalize(torch.randn(*per_token, 5, dtype=dtype), dim=-1).square(),
        "step": torch.rand(per_token, dtype=dtype) if step else 0.5,
        "aware": 2 * torch.rand(per_token, dtype=dtype) if aware else None,
        "log_decay": -0.1 * torch.rand(per_token, dtype=dtype) if gated else None,
        "initial": torch.rand(2, 3, 5, dtype=dtype),
    }


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("initial", [True, False])
def test_diagonal_scan_equals_its_loop(T, gated, initial, both, equal):
    tensors = diagonal_inputs(T, gated, initial)
    equal(both(diagonal_scan, tensors, backend="torch"), both(diagonal_scan, tensors, backend="reference"))


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("clip", ["token", "chunk", "none"])
@pytest.mark.parametrize(
    ("aware", "gated", "step"), [(True, True, True), (False, True, False), (True, False, True), (False, False, False)]
)
def test_hypergradient_scan_equals_its_loop(T, clip, aware, gated, step, both, equal):
    tensors = hypergradient_inputs(T, aware, gated, step)
    options = {"box": (0.3, 0.9), "clip": clip, "chunk_size": 16}
    found = both(hypergradient_scan, tensors, backend="torch", **options)
    equal(found, both(hypergradient_scan, tensors, backend="reference", **options))


@pytest.mark.parametrize("box", [(0.0, math.inf), (-math.inf, 0.5), (0.5, 0.5), None])
def test_one_sided_and_empty_boxes(box, both, equal):
    tensors = hypergradient_inputs(40)
    found = both(hypergradient_scan, tensors, box=box, backend="torch")
    equal(found, both(hypergradient_scan, tensors, box=box, backend="reference"))


def test_clipping_at_the_edge_passes_the_gradient_as_torch_clamp_does(both, equal):
    """With step 0 and d_1 on the edge, every update lands on the edge exactly."""
    tensors = {**hypergradient_inputs(6, gated=False), "initial": torch.full((2, 3, 5), 0.5, dtype=F64)}
    tensors["step"] = torch.zeros_like(tensors["step"])
    found = both(hypergradient_scan, tensors, box=(0.5, 1.0), backend="torch")
    equal(found, both(hypergradient_scan, tensors, box=(0.5, 1.0), backend="reference"))
    assert (found["gradient of initial"] != 0).all()


def test_clipping_by_chunk_is_another_function_and_none_ignores_the_box():
    tensors = hypergradient_inputs(64)
    exact, _ = hypergradient_scan(**tensors, box=(0.4, 0.8))
    by_chunk, carried = hypergradient_scan(**tensors, box=(0.4, 0.8), clip="chunk", chunk_size=16)
    without, _ = hypergradient_scan(**tensors, box=(0.4, 0.8), clip="none")
    assert (exact[:, 1:] >= 0.4).all()
    assert (exact[:, 1:] <= 0.8).all()
    assert not torch.allclose(exact, by_chunk)
    assert ((by_chunk[:, 16] >= 0.4) & (by_chunk[:, 16] <= 0.8)).all()
    assert ((carried >= 0.4) & (carried <= 0.8)).all()
    assert torch.equal(without, hypergradient_scan(**tensors)[0])


@pytest.mark.parametrize("at", [16, 37])
def test_two_halves_are_one_pass(at):
    tensors, options = hypergradient_inputs(90), {"box": (0.3, 0.9)}
    cuts = [{k: v[:, cut] if k != "initial" else v for k, v in tensors.items()} for cut in (slice(None, at), slice(at, None))]
    whole, final = hypergradient_scan(**tensors, **options)
    first, state = hypergradient_scan(**cuts[0], **options)
    second, end = hypergradient_scan(**{**cuts[1], "initial": state}, **options)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(end, final, rtol=1e-10, atol=1e-10)

    sums = diagonal_inputs(90)
    whole, final = diagonal_scan(**sums)
    first, state = diagonal_scan(sums["u"][:, :at], sums["log_decay"][:, :at], sums["initial"])
    second, end = diagonal_scan(sums["u"][:, at:], sums["log_decay"][:, at:], state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(end, final, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("clip", ["token", "none"])
def test_gradcheck_of_the_hypergradient_scan(clip):
    tensors = hypergradient_inputs(5)
    names = list(tensors)

    def run(*values):
        return hypergradient_scan(**dict(zip(names, values, strict=True)), box=(0.2, 1.1), clip=clip, chunk_size=2)

    assert torch.autograd.gradcheck(run, [tensors[name].requires_grad_() for name in names])


def test_gradcheck_of_the_diagonal_scan():
    tensors = diagonal_inputs(5)
    assert torch.autograd.gradcheck(lambda *x: diagonal_scan(*x, chunk_size=2), [x.requires_grad_() for x in tensors.values()])


@pytest.mark.parametrize("clip", ["token", "none"])
def test_forgetting_everything_is_finite(clip, both, equal):
    tensors = hypergradient_inputs(40)
    tensors["log_decay"][:, [0, 7, 33]] = -math.inf
    found = both(hypergradient_scan, tensors, box=(-1.0, 3.0), clip=clip, backend="torch")
    equal(found, both(hypergradient_scan, tensors, box=(-1.0, 3.0), clip=clip, backend="reference"))
    sums = diagonal_inputs(40)
    sums["log_decay"][:, [0, 7, 33]] = -math.inf
    equal(both(diagonal_scan, sums, backend="torch"), both(diagonal_scan, sums, backend="reference"))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_no_tokens_and_half_precision(backend):
    empty = hypergradient_inputs(0)
    d, final = hypergradient_scan(**empty, box=(0, 1), backend=backend)
    assert d.shape == (2, 0, 3, 5)
    assert torch.equal(final, empty["initial"])
    assert torch.equal(hypergradient_scan(**empty, clip="none", backend=backend)[1], empty["initial"])
    sums = diagonal_inputs(0)
    assert torch.equal(diagonal_scan(**sums, backend=backend)[1], sums["initial"])
    assert torch.equal(diagonal_scan(sums["u"], None, sums["initial"], backend=backend)[1], sums["initial"])
    coarse = torch.rand(1, 20, 2, 4).bfloat16()
    for outputs in (diagonal_scan(coarse, backend=backend), hypergradient_scan(coarse, 0.5, backend=backend)):
        assert {x.dtype for x in outputs} == {torch.float32}


@pytest.mark.parametrize("aware", [False, True])
def test_the_update_is_the_normalised_hypergradient_of_the_feedback(aware):
    """One step of d, against finite differences of f(S+) = |v - S+^T k|^2 / 2 with S+ = S + beta (v - S^T k) (d*k)^T.

    Divided by 2 f(S) as the curvature normalisation does, the derivative no longer depends on S or v: any memory gives the
    same update [recurrences.md, section 4.2 and invariant 6].
    """
    K, V, eta, delta = 6, 4, 0.3, 1e-5
    k = normalize(torch.randn(K, dtype=F64), dim=0)
    beta = torch.tensor(0.7, dtype=F64)
    d = torch.rand(K, dtype=F64)
    found, after = hypergradient_scan(
        (k * k).view(1, 1, 1, K), eta, beta.view(1, 1, 1) if aware else None, initial=d.view(1, 1, K), clip="none"
    )
    b = beta if aware else torch.ones((), dtype=F64)

    def feedback(weights, S, v):
        return (v - (S + b * torch.outer(weights * k, v - S.T @ k)).T @ k).square().sum() / 2

    updates = []
    for _ in range(5):
        S, v = torch.randn(K, V, dtype=F64), torch.randn(V, dtype=F64)
        shifts = delta * torch.eye(K, dtype=F64)
        gradient = torch.stack([feedback(d + x, S, v) - feedback(d - x, S, v) for x in shifts]) / (2 * delta)
        updates.append(d - eta * gradient / (v - S.T @ k).square().sum())
    spread = torch.stack(updates).std(0).max()
    assert spread < 1e-9
    torch.testing.assert_close(after.flatten(), updates[0], rtol=1e-8, atol=1e-9)
    assert torch.equal(found.flatten(), d)


def test_a_resting_preconditioner_is_the_delta_rule():
    """Unit keys, beta-blind, d_1 = 1, nothing forgotten: <1, k*k> = 1, so d never moves [invariant 5]."""
    k = normalize(torch.randn(1, 50, 2, 6, dtype=F64), dim=-1)
    d, _ = hypergradient_scan(k * k, 1.0, initial=torch.ones(1, 2, 6, dtype=F64), box=(0.0, math.inf))
    torch.testing.assert_close(d, torch.ones_like(d), rtol=0, atol=1e-12)
    q, v = torch.randn_like(k), torch.randn_like(k)
    torch.testing.assert_close(delta_rule(q, k, d * k, v)[0], delta_rule(q, k, k, v)[0], rtol=1e-9, atol=1e-10)


def test_the_scan_is_a_delta_rule_of_value_width_one():
    """Key s, write key step*s, target 1, and the memory itself is d: an independent oracle for the unclipped scan."""
    tensors = hypergradient_inputs(60, aware=False, gated=False)
    s, step = tensors["s"], tensors["step"]
    _, state = delta_rule(s, s, step[..., None] * s, torch.ones_like(step)[..., None], None, tensors["initial"][..., None])
    torch.testing.assert_close(hypergradient_scan(**tensors)[1], state[..., 0], rtol=1e-10, atol=1e-10)


def test_a_planted_fault_is_found(both, equal, monkeypatch):
    solve = scans.solve
    monkeypatch.setattr(scans, "solve", lambda L, rhs, transposed=False: solve(L * (1 + 1e-6), rhs, transposed))
    tensors = hypergradient_inputs(65)
    with pytest.raises(AssertionError, match="output"):
        equal(
            both(hypergradient_scan, tensors, clip="none", backend="torch"),
            both(hypergradient_scan, tensors, clip="none", backend="reference"),
        )
