"""The query-side solve: conjugate gradients against direct solves, the implicit gradients, and the edges of both."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from deltalab.errors import UserError
from deltalab.kernels import conjugate, gram_solve, inverse_gram_scan, layout

F64 = torch.float64
B, H, K = 2, 3, 5
GATES = {"none": None, "mild": 0.1, "strong": 3.0}


def inputs(T, gate="mild", beta=True, initial=True, dtype=F64):
    """Every fourth weight is 0."""
    root = torch.randn(B, H, K, K, dtype=dtype)
    strength = GATES[gate]
    return {
        "q": torch.randn(B, T, H, K, dtype=dtype),
        "key": torch.randn(B, T, H, K, dtype=dtype),
        "beta": torch.rand(B, T, H, dtype=dtype) * (torch.rand(B, T, H) > 0.25) if beta else None,
        "log_decay": None if strength is None else -strength * torch.rand(B, T, H, dtype=dtype),
        "ridge": 0.2 + torch.rand(H, K, dtype=dtype),
        "initial": root @ root.mT / K if initial else None,
    }


@pytest.mark.parametrize("T", [1, 2, 31, 33, 130])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("beta", "initial"), [(True, True), (False, True), (True, False)])
def test_conjugate_gradients_equal_direct_solves(T, gate, beta, initial, both, equal):
    x = inputs(T, gate, beta, initial)
    equal(both(gram_solve, x, backend="torch"), both(gram_solve, x, backend="reference"), 1e-9)


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_the_chunk_size_and_the_span_are_not_part_of_the_function(chunk, both, equal, monkeypatch):
    x = inputs(70)
    expected = both(gram_solve, x, backend="reference")
    equal(both(gram_solve, x, chunk_size=chunk), expected, 1e-9)
    for span in (1, 1 << 40):
        monkeypatch.setattr(layout, "_CPU_SPAN", span)
        equal(both(gram_solve, x, chunk_size=chunk), expected, 1e-9)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("gate", GATES)
def test_it_applies_the_explicit_inverse_at_every_token(gate, backend):
    x = inputs(40, gate)
    G, ridge = x["initial"], torch.diag_embed(x["ridge"])
    solution, final = gram_solve(**x, backend=backend)
    for t in range(40):
        k, b = x["key"][:, t], x["beta"][:, t, :, None, None]
        G = G if x["log_decay"] is None else x["log_decay"][:, t, :, None, None].exp() * G
        G = G + b * k[..., :, None] * k[..., None, :]
        expected = torch.einsum("bhij,bhj->bhi", torch.linalg.inv(G + ridge), x["q"][:, t])
        torch.testing.assert_close(solution[:, t], expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(final, G, rtol=1e-10, atol=1e-10)


def test_without_forgetting_it_is_recursive_least_squares():
    """Two algorithms that share no code: P_0 = (G_0 + ridge)^-1, read after each token's update."""
    x = inputs(70, "none")
    start = torch.linalg.inv(x["initial"] + torch.diag_embed(x["ridge"]))
    _, expected, P = inverse_gram_scan(x["key"], x["beta"], initial=start, after=x["q"])
    found, G = gram_solve(**x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(torch.linalg.inv(G + torch.diag_embed(x["ridge"])), P, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("T", [1, 5])
def test_gradcheck(gate, T):
    x = {
        "q": torch.randn(1, T, 2, 3, dtype=F64),
        "key": torch.randn(1, T, 2, 3, dtype=F64),
        "beta": torch.rand(1, T, 2, dtype=F64),
        "log_decay": None if GATES[gate] is None else -GATES[gate] * torch.rand(1, T, 2, dtype=F64),
        "ridge": 0.5 + torch.rand(2, 3, dtype=F64),
        "initial": torch.eye(3, dtype=F64).repeat(1, 2, 1, 1) + 0.1 * torch.randn(1, 2, 3, 3, dtype=F64),
    }
    names = [name for name, value in x.items() if value is not None]

    def run(*values):
        return gram_solve(**dict(zip(names, values, strict=True)), chunk_size=2)

    assert torch.autograd.gradcheck(run, [x[name].requires_grad_() for name in names])


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("only", ["q", "key", "beta", "log_decay", "ridge", "initial"])
def test_each_gradient_alone_through_each_output_alone(only, part):
    x, found = inputs(40), []
    for backend in ("torch", "reference"):
        leaf = x[only].clone().requires_grad_()
        out = gram_solve(**{**x, only: leaf}, backend=backend)[part]
        if not out.requires_grad:
            assert part == 1 and only in ("q", "ridge")
            return
        found.append(torch.autograd.grad(out.square().sum(), leaf, allow_unused=True)[0])
    mine, theirs = (torch.zeros_like(x[only]) if gradient is None else gradient for gradient in found)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cuts", [[37, 70], list(range(1, 71))])
@pytest.mark.parametrize("gate", GATES)
def test_pieces_are_one_pass(cuts, gate):
    x = inputs(70, gate)
    whole, final = gram_solve(**x)
    pieces, state, start = [], x["initial"], 0
    for stop in cuts:
        piece = {name: x[name] if x[name] is None else x[name][:, start:stop] for name in ("q", "key", "beta", "log_decay")}
        solution, state = gram_solve(**piece, ridge=x["ridge"], initial=state)
        pieces.append(solution)
        start = stop
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(state, final, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_zero_queries_give_zeros_and_zero_keys_give_q_over_ridge(backend, dtype):
    x = inputs(20, dtype=dtype)
    x["q"][:, ::3] = 0
    leaves = {name: value.clone().requires_grad_() for name, value in x.items()}
    solution, _ = gram_solve(**leaves, backend=backend)
    assert (solution[:, ::3] == 0).all()
    assert (solution[:, 1::3] != 0).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(solution.square().sum(), list(leaves.values())))
    still = {**x, "key": torch.zeros_like(x["key"]), "initial": None}
    torch.testing.assert_close(gram_solve(**still, backend=backend)[0], x["q"] / x["ridge"])


def test_tiny_queries_and_tiny_gradients_keep_their_digits():
    """float32 cannot square 1e-30: every token is solved at the size of its own q."""
    x = {name: value.float() for name, value in inputs(40).items()}
    expected, _ = gram_solve(**x)
    torch.testing.assert_close(gram_solve(**{**x, "q": 1e-30 * x["q"]})[0] * 1e30, expected, rtol=1e-4, atol=1e-5)
    gradients = []
    for size in (1.0, 1e-30):
        ridge = x["ridge"].clone().requires_grad_()
        solution = gram_solve(**{**x, "ridge": ridge})[0]
        gradients.append(torch.autograd.grad((size * solution).sum(), ridge)[0] / size)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def counted(monkeypatch):
    """How often the Gram matrices of a span are applied."""
    calls = []
    times = conjugate._Span.times
    monkeypatch.setattr(conjugate._Span, "times", lambda span, p: calls.append(1) or times(span, p))
    return calls


def test_iterations_end_where_the_residual_does_and_where_they_are_told_to(monkeypatch):
    calls, x = counted(monkeypatch), inputs(30)
    exact, _ = gram_solve(**x, iterations=1000)
    assert len(calls) <= 4 * K
    errors = []
    for iterations in (1, 3, 5):
        calls.clear()
        errors.append(float((gram_solve(**x, iterations=iterations)[0] - exact).abs().max()))
        assert len(calls) == iterations + 1
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    calls.clear()
    gram_solve(**{**x, "q": torch.zeros_like(x["q"])})
    assert len(calls) == 1


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("norms", ["small", "large", "mixed", "parallel"])
def test_float32_stays_finite_whatever_the_keys(norms, gate):
    x = {name: None if value is None else value.float() for name, value in inputs(200, gate).items()}
    key = normalize(x["key"], dim=-1)
    size = {"small": 1e-3, "large": 1e3, "mixed": 10 ** (6 * torch.rand(B, 200, H, 1) - 3), "parallel": 1e3}[norms]
    x["key"] = (key[:, :1] if norms == "parallel" else key) * size * torch.ones(B, 200, H, 1)
    leaves = {name: value.clone().requires_grad_() for name, value in x.items() if value is not None}
    outputs = gram_solve(**leaves)
    gradients = torch.autograd.grad(sum(y.sum() for y in outputs), list(leaves.values()))
    assert all(torch.isfinite(y).all() for y in (*outputs, *gradients))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_float32_is_as_good_as_its_digits(backend):
    x = {name: value.float() for name, value in inputs(300).items()}
    expected = gram_solve(**{name: value.double() for name, value in x.items()})
    for found, exact in zip(gram_solve(**x, backend=backend), expected, strict=True):
        assert found.dtype == torch.float32
        assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_minus_infinity_resets_the_gram_matrix(both, equal):
    x = inputs(50)
    x["log_decay"][:, [0, 7, 33]] = -math.inf
    equal(both(gram_solve, x, backend="torch"), both(gram_solve, x, backend="reference"), 1e-9)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_no_tokens_half_precision_and_autocast(backend):
    empty = inputs(0)
    solution, final = gram_solve(**empty, backend=backend)
    assert solution.shape == (B, 0, H, K)
    torch.testing.assert_close(final, empty["initial"])
    assert not gram_solve(**{**empty, "initial": None}, backend=backend)[1].any()
    coarse = {name: value.bfloat16() for name, value in inputs(20).items()}
    assert {y.dtype for y in gram_solve(**coarse, backend=backend)} == {torch.float32}
    for T in (1, 20):
        x, results = inputs(T, dtype=torch.float32), []
        x["key"].requires_grad_()
        for enabled in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                outputs = gram_solve(**x, backend=backend)
                # The definition's backward is autograd's own, and would be cast: torch asks to leave autocast before it.
                with torch.autocast("cpu", enabled=enabled and backend == "torch"):
                    results.append([*outputs, *torch.autograd.grad(sum(y.sum() for y in outputs), x["key"])])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_it_is_deterministic_and_the_same_without_gradients():
    x = inputs(100, dtype=torch.float32)
    first, second = gram_solve(**x), gram_solve(**x)
    x["key"].requires_grad_()
    third = gram_solve(**x)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
        assert not a.requires_grad and c.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q": torch.ones(B, 4, K)}, r"q: expected shape \[B,T,H,K\] \(4 dimensions\), got \[2, 4, 5\]"),
        ({"key": torch.ones(B, 4, H, K)}, r"key: expected dtype torch.float64 \(that of q\), got torch.float32"),
        ({"key": torch.ones(B, 5, H, K).double()}, r"key: expected shape \[B,T,H,K\] = \[2, 4, 3, 5\], got \[2, 5, 3, 5\]"),
        ({"beta": torch.ones(B, 4)}, r"beta: expected shape \[B,T,H\] = \[2, 4, 3\], got \[2, 4\]"),
        ({"log_decay": torch.ones(B, 4, H, K)}, r"log_decay: expected shape \[B,T,H\] = \[2, 4, 3\], got \[2, 4, 3, 5\]"),
        ({"ridge": 0.1}, r"ridge: expected a torch.Tensor, got float"),
        ({"ridge": torch.ones(K)}, r"ridge: expected shape \[H,K\] = \[3, 5\], got \[5\]"),
        ({"ridge": torch.ones(H, K, device="meta")}, r"ridge: expected device cpu \(that of q\), got meta"),
        ({"initial": torch.ones(B, H, K)}, r"initial: expected shape \[B,H,K,K\] = \[2, 3, 5, 5\], got \[2, 3, 5\]"),
        ({"iterations": 0}, r"iterations: expected a whole number of at least 1, got 0"),
        ({"iterations": 2.0}, r"iterations: expected a whole number of at least 1, got 2.0"),
        ({"chunk_size": True}, r"chunk_size: expected a whole number"),
        ({"backend": "referense"}, r"backend: unknown backend 'referense'. Did you mean 'reference'"),
    ],
)
def test_what_is_wrong_is_named(options, message):
    with pytest.raises(UserError, match=f"^{message}"):
        gram_solve(**{**inputs(4), **options})


def test_a_planted_fault_is_found(both, equal, monkeypatch):
    times = conjugate._Span.times
    monkeypatch.setattr(conjugate._Span, "times", lambda span, p: times(span, p) * (1 + 1e-7))
    x = inputs(33)
    with pytest.raises(AssertionError, match="output"):
        equal(both(gram_solve, x, backend="torch"), both(gram_solve, x, backend="reference"), 1e-9)
