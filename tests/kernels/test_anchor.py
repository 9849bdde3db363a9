"""The anchor: where a preconditioner's statistic forgets to, in both scans and every form of them."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from deltalab.errors import UserError
from deltalab.kernels import diagonal_scan, hypergradient_scan, scans, token_scan

F64 = torch.float64
B, H, K = 2, 3, 5


def hypergradient_inputs(T, aware=True):
    return {
        "s": normalize(torch.randn(B, T, H, K, dtype=F64), dim=-1).square(),
        "step": torch.rand(B, T, H, dtype=F64),
        "aware": 2 * torch.rand(B, T, H, dtype=F64) if aware else None,
        "log_decay": -0.3 * torch.rand(B, T, H, dtype=F64),
        "initial": torch.rand(B, H, K, dtype=F64),
        "anchor": torch.rand(B, H, K, dtype=F64) + 0.3,
    }


def diagonal_inputs(T):
    return {
        "u": torch.rand(B, T, H, K, dtype=F64),
        "log_decay": -torch.rand(B, T, H, dtype=F64),
        "initial": torch.rand(B, H, K, dtype=F64),
        "anchor": torch.rand(B, H, K, dtype=F64),
    }


@pytest.mark.parametrize("T", [1, 2, 63, 65, 130])
@pytest.mark.parametrize("clip", ["token", "chunk", "none"])
@pytest.mark.parametrize("aware", [True, False])
def test_hypergradient_scan_equals_its_loop(T, clip, aware, both, equal):
    tensors = hypergradient_inputs(T, aware)
    options = {"box": (0.3, 0.9), "clip": clip, "chunk_size": 16}
    found = both(hypergradient_scan, tensors, backend="torch", **options)
    equal(found, both(hypergradient_scan, tensors, backend="reference", **options))
    assert (found["gradient of anchor"] != 0).any()


@pytest.mark.parametrize("T", [1, 2, 65, 130])
def test_diagonal_scan_equals_its_loop(T, both, equal):
    tensors = diagonal_inputs(T)
    equal(both(diagonal_scan, tensors, backend="torch"), both(diagonal_scan, tensors, backend="reference"))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("clip", ["token", "chunk", "none"])
def test_the_loop_is_the_equation(clip, backend):
    """Written out once more, from the equation alone."""
    x = hypergradient_inputs(20)
    found, final = hypergradient_scan(**x, box=(0.3, 0.9), clip=clip, chunk_size=8, backend=backend)
    d = x["initial"]
    for t in range(20):
        torch.testing.assert_close(found[:, t], d, rtol=1e-10, atol=1e-12)
        gamma, b = x["log_decay"][:, t, :, None].exp(), x["aware"][:, t, :, None]
        error = 1 - b * torch.einsum("bhk,bhk->bh", d, x["s"][:, t])[..., None]
        d = torch.lerp(x["anchor"], d, gamma) + x["step"][:, t, :, None] * b * error * x["s"][:, t]
        if clip == "token" or (clip == "chunk" and (t % 8 == 7 or t == 19)):
            d = d.clip(0.3, 0.9)
    torch.testing.assert_close(final, d, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("clip", ["token", "chunk", "none"])
def test_without_steps_the_way_to_the_anchor_is_exponential(clip, backend):
    x = {**hypergradient_inputs(90), "step": 0.0}
    d, final = hypergradient_scan(**x, box=(-9.0, 9.0), clip=clip, backend=backend)
    left = x["log_decay"].cumsum(1).exp()[..., None]
    expected = x["anchor"][:, None] + left * (x["initial"] - x["anchor"])[:, None]
    torch.testing.assert_close(torch.cat([d[:, 1:], final[:, None]], dim=1), expected, rtol=1e-10, atol=1e-12)
    sums = {**diagonal_inputs(90), "u": torch.zeros(B, 90, H, K, dtype=F64)}
    A, _ = diagonal_scan(**sums, backend=backend)
    left = sums["log_decay"].cumsum(1).exp()[..., None]
    expected = sums["anchor"][:, None] + left * (sums["initial"] - sums["anchor"])[:, None]
    torch.testing.assert_close(A, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("clip", ["token", "chunk", "none"])
def test_an_anchor_is_a_rest_point_in_float32(clip):
    """d = anchor = 1 and nothing to learn: 4,000 tokens of slow forgetting leave it where it is."""
    s = normalize(torch.randn(1, 4_000, 1, 4), dim=-1).square()
    gate = torch.full((1, 4_000, 1), -1e-3)
    d, _ = hypergradient_scan(s, 0.0, None, gate, torch.ones(1, 1, 4), (2 / 3, 3 / 2), clip, anchor=1.0)
    torch.testing.assert_close(d, torch.ones_like(d), rtol=0, atol=3e-5)


@pytest.mark.parametrize("clip", ["token", "chunk"])
def test_what_is_clipped_is_at_the_edge_exactly(clip):
    s = normalize(torch.randn(1, 64, 1, 4), dim=-1).square()
    gate = torch.full((1, 64, 1), -1.0)
    d, final = hypergradient_scan(s, 0.01, None, gate, None, (2 / 3, 3 / 2), clip, chunk_size=8, anchor=0.1)
    edge = torch.tensor(2 / 3)
    assert torch.equal(final, edge.expand_as(final))
    assert (d[:, 8] == edge).all()


@pytest.mark.parametrize("clip", ["token", "chunk", "none"])
def test_no_anchor_is_zero_and_a_number_is_a_full_tensor(clip):
    x = hypergradient_inputs(40)
    x.pop("anchor")
    options = {"box": (0.0, 0.9), "clip": clip}
    plain = hypergradient_scan(**x, **options)
    for number in (0, 0.0):
        torch.testing.assert_close(hypergradient_scan(**x, **options, anchor=number), plain, rtol=1e-12, atol=1e-12)
    third = torch.full((B, H, K), 1 / 3, dtype=F64)
    found = hypergradient_scan(**x, **options, anchor=1 / 3)
    assert all(torch.equal(a, b) for a, b in zip(found, hypergradient_scan(**x, **options, anchor=third), strict=True))
    sums = diagonal_inputs(40)
    sums.pop("anchor")
    assert torch.equal(diagonal_scan(**sums, anchor=1 / 3)[0], diagonal_scan(**sums, anchor=third)[0])
    torch.testing.assert_close(diagonal_scan(**sums, anchor=0), diagonal_scan(**sums), rtol=1e-12, atol=1e-12)


def test_without_forgetting_it_has_no_effect():
    x, sums = hypergradient_inputs(40), diagonal_inputs(40)
    x["log_decay"] = sums["log_decay"] = None
    for clip in ("token", "chunk", "none"):
        options = {"box": (0.0, 0.9), "clip": clip}
        assert torch.equal(hypergradient_scan(**x, **options)[0], hypergradient_scan(**{**x, "anchor": None}, **options)[0])
    assert torch.equal(diagonal_scan(**sums)[0], diagonal_scan(**{**sums, "anchor": None})[0])


@pytest.mark.parametrize("clip", ["token", "none"])
def test_two_halves_are_one_pass_and_so_are_tokens(clip):
    x, options = hypergradient_inputs(40), {"box": (0.3, 0.9), "clip": clip}
    whole, final = hypergradient_scan(**x, **options)
    for cuts in ([17, 40], list(range(1, 41))):
        found, state, start = [], x["initial"], 0
        for stop in cuts:
            piece = {name: x[name][:, start:stop] for name in ("s", "step", "aware", "log_decay")}
            d, state = hypergradient_scan(**piece, initial=state, anchor=x["anchor"], **options)
            found.append(d)
            start = stop
        torch.testing.assert_close(torch.cat(found, dim=1), whole, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(state, final, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("clip", ["token", "chunk", "none"])
def test_gradcheck(clip):
    x = hypergradient_inputs(5)
    names = list(x)

    def run(*values):
        return hypergradient_scan(**dict(zip(names, values, strict=True)), box=(0.2, 1.1), clip=clip, chunk_size=2)

    assert torch.autograd.gradcheck(run, [x[name].requires_grad_() for name in names])
    sums = {name: value.requires_grad_() for name, value in diagonal_inputs(5).items()}
    assert torch.autograd.gradcheck(
        lambda *values: diagonal_scan(**dict(zip(sums, values, strict=True)), chunk_size=2), list(sums.values())
    )


@pytest.mark.parametrize("clip", ["token", "none"])
def test_forgetting_everything_lands_on_the_anchor(clip, both, equal):
    x = hypergradient_inputs(40)
    x["log_decay"][:, [0, 7, 33]] = -math.inf
    options = {"box": (-1.0, 3.0), "clip": clip}
    found = both(hypergradient_scan, x, backend="torch", **options)
    equal(found, both(hypergradient_scan, x, backend="reference", **options))
    x["step"] = torch.zeros_like(x["step"])
    torch.testing.assert_close(hypergradient_scan(**x, **options)[0][:, 8], x["anchor"], rtol=0, atol=1e-12)
    sums = diagonal_inputs(40)
    sums["log_decay"][:, [0, 7, 33]] = -math.inf
    equal(both(diagonal_scan, sums, backend="torch"), both(diagonal_scan, sums, backend="reference"))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_no_tokens_and_half_precision(backend):
    empty = hypergradient_inputs(0)
    for clip in ("token", "chunk", "none"):
        d, final = hypergradient_scan(**empty, box=(0, 1), clip=clip, backend=backend)
        assert d.shape == (B, 0, H, K)
        assert torch.equal(final, empty["initial"])
    assert torch.equal(diagonal_scan(**diagonal_inputs(0), backend=backend)[0], torch.zeros(B, 0, H, K, dtype=F64))
    coarse, gate = torch.rand(1, 20, 2, 4).bfloat16(), -torch.rand(1, 20, 2).bfloat16()
    for outputs in (
        diagonal_scan(coarse, gate, anchor=torch.ones(1, 2, 4).bfloat16(), backend=backend),
        hypergradient_scan(coarse, 0.5, log_decay=gate, anchor=1, backend=backend),
    ):
        assert {x.dtype for x in outputs} == {torch.float32}
    assert hypergradient_scan(coarse, 0.5, log_decay=gate, anchor=torch.ones(1, 2, 4).double())[0].dtype == F64


@pytest.mark.parametrize(
    ("anchor", "message"),
    [
        ("1", r"anchor: expected a finite number or a tensor \[B,H,K\] or None, got '1'"),
        (True, r"anchor: expected a finite number"),
        (math.inf, r"anchor: expected a finite number .*got inf"),
        (torch.ones(K), r"anchor: expected shape \[B,H,K\] = \[2, 3, 5\], got \[5\]"),
        (torch.ones(B, H, K, dtype=torch.int64), r"anchor: expected a floating dtype"),
        (torch.ones(B, H, K, device="meta"), r"anchor: expected device cpu \(that of (s|u)\), got meta"),
    ],
)
def test_what_is_wrong_is_named(anchor, message):
    x, sums = hypergradient_inputs(4), diagonal_inputs(4)
    for function, tensors in ((hypergradient_scan, x), (diagonal_scan, sums)):
        with pytest.raises(UserError, match=f"^{message}"):
            function(**{**tensors, "anchor": anchor})


@pytest.mark.parametrize(("module", "clip"), [(scans, "none"), (token_scan, "token")])
def test_a_planted_fault_is_found(module, clip, both, equal, monkeypatch):
    """An anchor's gradient that is off by 1e-6 must not pass the comparison above."""
    gradients = module.hypergradient_gradients

    def faulty(*arguments):
        *others, d_anchor = gradients(*arguments)
        return *others, d_anchor * (1 + 1e-6)

    monkeypatch.setattr(module, "hypergradient_gradients", faulty)
    x, options = hypergradient_inputs(65), {"box": (0.3, 0.9), "clip": clip}
    found = both(hypergradient_scan, x, backend="torch", **options)
    with pytest.raises(AssertionError, match="gradient of anchor"):
        equal(found, both(hypergradient_scan, x, backend="reference", **options))
