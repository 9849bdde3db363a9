"""Recursive least squares: every form against the loop, the loop against explicit inverses, and the theory row it stands for."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from deltalab.errors import UserError
from deltalab.kernels import delta_rule, gram_blocks, inverse_gram_scan

F64 = torch.float64
B, H, K = 2, 3, 5
GATES = {"none": None, "mild": 0.1, "strong": 1.0}


def inputs(T, gate="mild", beta=True, after=True, dtype=F64):
    """Every fourth weight is 0. Read rows that are not the keys."""
    root = torch.randn(B, H, K, K, dtype=dtype)
    weights = torch.rand(B, T, H, dtype=dtype) * (torch.rand(B, T, H) > 0.25)
    strength = GATES[gate]
    return {
        "key": torch.randn(B, T, H, K, dtype=dtype),
        "beta": weights if beta else None,
        "log_decay": None if strength is None else -strength * torch.rand(B, T, H, dtype=dtype),
        "initial": root @ root.mT / K + torch.eye(K, dtype=dtype),
        "before": torch.randn(B, T, H, K, dtype=dtype),
        "after": torch.randn(B, T, H, K, dtype=dtype) if after else None,
    }


def joined(**arguments):
    """Both kinds of rows in one tensor, for the fixtures that compare a pair."""
    seen, updated, final = inverse_gram_scan(**arguments)
    return seen if updated is None else torch.cat([seen, updated], dim=1), final


def grams(x):
    """G_0, G_1, ... [T+1,B,H,K,K], from their definition."""
    found = [torch.linalg.inv(x["initial"])]
    for t in range(x["key"].shape[1]):
        k, b = x["key"][:, t], 1.0 if x["beta"] is None else x["beta"][:, t, :, None, None]
        alpha = 1.0 if x["log_decay"] is None else x["log_decay"][:, t, :, None, None].exp()
        found.append(alpha * found[-1] + b * k[..., :, None] * k[..., None, :])
    return torch.stack(found)


@pytest.mark.parametrize("T", [1, 2, 31, 33, 70])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("beta", "after"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("limit", [1e6, 3.0])
def test_every_form_equals_the_loop(T, gate, beta, after, limit, both, equal):
    """A limit of 3 is met again and again: which tokens may forget has to be the same too."""
    x = inputs(T, gate, beta, after)
    equal(both(joined, x, limit=limit, backend="torch"), both(joined, x, limit=limit, backend="reference"), 1e-9)


@pytest.mark.parametrize("chunk", [1, 3, 8, 64])
@pytest.mark.parametrize("gate", GATES)
def test_the_chunk_size_is_not_part_of_the_function(chunk, gate, both, equal):
    x = inputs(50, gate)
    equal(both(joined, x, backend="torch", chunk_size=chunk), both(joined, x, backend="reference"), 1e-9)


@pytest.mark.parametrize("form", ["products", "halves", "tokens"])
@pytest.mark.parametrize("gate", ["none", "mild"])
def test_each_form_alone_equals_the_loop(form, gate, both, equal, monkeypatch):
    """What is refused is halved: products of 32 tokens, of 8 tokens at most, and of none."""
    taken = set()
    for name in ("Products", "Halves", "Tokens"):
        kind = getattr(gram_blocks, name)
        make = kind.of.__func__

        def of(cls, x, P, limit, make=make, name=name):
            if name == "Products" and (form == "tokens" or (form == "halves" and x.key.shape[1] > 8)):
                return None
            found = make(cls, x, P, limit)
            taken.update([name] if found is not None else [])
            return found

        monkeypatch.setattr(kind, "of", classmethod(of))
    monkeypatch.setattr(gram_blocks, "_MOST_FORGOTTEN", 20.0)
    x = inputs(64, gate)
    found = both(joined, x, backend="torch")
    assert taken == {"products": {"Products"}, "halves": {"Halves", "Products"}, "tokens": {"Halves", "Tokens"}}[form]
    equal(found, both(joined, x, backend="reference"), 1e-9)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("gate", GATES)
def test_it_reads_the_explicit_inverse_at_every_token(gate, backend):
    x = inputs(40, gate)
    seen, updated, final = inverse_gram_scan(**x, backend=backend)
    P = torch.linalg.inv(grams(x))
    scale = {"rtol": 1e-9, "atol": 1e-9 * float(P.abs().max())}
    torch.testing.assert_close(seen, torch.einsum("tbhij,bthj->bthi", P[:-1], x["before"]), **scale)
    torch.testing.assert_close(updated, torch.einsum("tbhij,bthj->bthi", P[1:], x["after"]), **scale)
    torch.testing.assert_close(final, P[-1], **scale)
    own, none, _ = inverse_gram_scan(**{**x, "before": None, "after": None}, backend=backend)
    torch.testing.assert_close(own, torch.einsum("tbhij,bthj->bthi", P[:-1], x["key"]), **scale)
    assert none is None


@pytest.mark.parametrize("gate", GATES)
def test_the_write_key_of_exact_preconditioning_is_the_inverse_gram_on_the_query(gate):
    """S_t = C_t P_t for every t, with forgetting too: the state itself is not decayed  [recurrences.md, section 3]."""
    T, V = 45, 4
    x = {**inputs(T, gate), "before": None}
    q, v = torch.randn(B, T, H, K, dtype=F64), torch.randn(B, T, H, V, dtype=F64)
    u, preconditioned, _ = inverse_gram_scan(**{**x, "after": q})
    alpha = torch.ones_like(x["beta"]) if x["log_decay"] is None else x["log_decay"].exp()
    step = x["beta"] / (alpha + x["beta"] * (x["key"] * u).sum(-1))
    write_key = step[..., None] * u
    o, _ = delta_rule(q, x["key"], write_key, v, scale=1.0)
    heavy = x["beta"][..., None] * x["key"]
    expected, _ = delta_rule(preconditioned, None, heavy, v, x["log_decay"], erase=False, scale=1.0)
    torch.testing.assert_close(o, expected, rtol=1e-9, atol=1e-9)
    # A diagonal P is another function: what this test would not see, it would not prove.
    diagonal, _, _ = inverse_gram_scan(**{**x, "initial": torch.diag_embed(x["initial"].diagonal(dim1=-2, dim2=-1))})
    other, _ = delta_rule(q, x["key"], step[..., None] * diagonal, v, scale=1.0)
    assert (other - expected).abs().max() > 1e-3


@pytest.mark.parametrize("cuts", [[37, 70], list(range(1, 71))])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("limit", [1e6, 3.0])
def test_pieces_are_one_pass(cuts, gate, limit):
    x = inputs(70, gate)
    whole = inverse_gram_scan(**x, limit=limit)
    pieces, state, start = [], x["initial"], 0
    for stop in cuts:
        piece = {name: None if value is None else value[:, start:stop] for name, value in x.items() if name != "initial"}
        seen, updated, state = inverse_gram_scan(**piece, initial=state, limit=limit)
        pieces.append((seen, updated))
        start = stop
    for found, expected in zip((*(torch.cat(part, dim=1) for part in zip(*pieces, strict=True)), state), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("chunk", [1, 64])
def test_gradcheck(gate, chunk, monkeypatch):
    monkeypatch.setattr(gram_blocks, "_SHORTEST", 2)
    x = {
        "key": torch.randn(1, 5, 2, 3, dtype=F64),
        "beta": torch.rand(1, 5, 2, dtype=F64),
        "log_decay": None if GATES[gate] is None else -GATES[gate] * torch.rand(1, 5, 2, dtype=F64),
        "initial": torch.eye(3, dtype=F64).repeat(1, 2, 1, 1) + 0.1 * torch.randn(1, 2, 3, 3, dtype=F64),
        "before": torch.randn(1, 5, 2, 3, dtype=F64),
        "after": torch.randn(1, 5, 2, 3, dtype=F64),
    }
    names = [name for name, value in x.items() if value is not None]

    def run(*values):
        return inverse_gram_scan(**dict(zip(names, values, strict=True)), chunk_size=chunk)

    assert torch.autograd.gradcheck(run, [x[name].requires_grad_() for name in names])


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("gate", GATES)
def test_the_gradient_through_each_output_alone(part, gate):
    x = inputs(40, gate)
    names, found = [name for name, value in x.items() if value is not None], []
    for backend in ("torch", "reference"):
        leaves = {name: x[name].clone().requires_grad_() for name in names}
        out = inverse_gram_scan(**leaves, backend=backend)[part]
        found.append(torch.autograd.grad(out.square().sum(), list(leaves.values()), allow_unused=True))
    for name, mine, theirs in zip(names, *found, strict=True):
        expected = torch.zeros_like(x[name]) if theirs is None else theirs
        mine = torch.zeros_like(x[name]) if mine is None else mine
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()), msg=name)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_only_the_symmetric_part_of_initial_counts_and_the_state_stays_symmetric(backend):
    x = inputs(50)
    skew = torch.randn(B, H, K, K, dtype=F64)
    found = inverse_gram_scan(**{**x, "initial": x["initial"] + skew - skew.mT}, backend=backend)
    for mine, expected in zip(found, inverse_gram_scan(**x, backend=backend), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(found[2], found[2].mT)
    assert (torch.linalg.eigvalsh(found[2]) > 0).all()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("T", [1, 20])
def test_zero_keys_and_zero_weights_leave_the_state_alone(T, backend):
    x = inputs(T, "none")
    for name in ("key", "beta"):
        still = {**x, name: torch.zeros_like(x[name])}
        leaves = {n: value.clone().requires_grad_() for n, value in still.items() if value is not None}
        seen, updated, final = inverse_gram_scan(**leaves, backend=backend)
        torch.testing.assert_close(final, x["initial"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(seen, torch.einsum("bhij,bthj->bthi", x["initial"], x["before"]), rtol=1e-12, atol=1e-12)
        for gradient in torch.autograd.grad((seen.sum() + updated.square().sum()), list(leaves.values())):
            assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_token_forgets_only_where_the_limit_allows_it(backend):
    """The rule, written out once more; met by some tokens and not by others."""
    x, limit = inputs(40, "strong"), 4.0
    P, held = x["initial"], 0
    for t in range(40):
        k, b, alpha = x["key"][:, t], x["beta"][:, t], x["log_decay"][:, t].exp()
        may = torch.einsum("bhii->bh", P) / K <= alpha * limit
        held += int((~may).sum())
        G = torch.where(may, alpha, 1.0)[..., None, None] * torch.linalg.inv(P)
        P = torch.linalg.inv(G + b[..., None, None] * k[..., :, None] * k[..., None, :])
    assert 0 < held < 40 * B * H
    final = inverse_gram_scan(**x, limit=limit, backend=backend)[2]
    torch.testing.assert_close(final, P, rtol=1e-8, atol=1e-8)
    assert (final.diagonal(dim1=-2, dim2=-1).mean(-1) <= limit).all()


@pytest.mark.parametrize("axis", [True, False])
def test_keys_of_one_direction_and_strong_forgetting_stay_finite_in_float32(axis):
    T, width = 65_536, 4
    one = torch.eye(width)[0] if axis else normalize(torch.arange(1.0, width + 1), dim=0)
    key = one.expand(1, T, 1, width).clone().requires_grad_()
    log_decay = torch.full((1, T, 1), math.log(0.9), requires_grad=True)
    outputs = inverse_gram_scan(key, None, log_decay, torch.eye(width).view(1, 1, width, width), after=key)
    gradients = torch.autograd.grad(sum(x.sum() for x in outputs), [key, log_decay])
    assert all(torch.isfinite(x).all() for x in (*outputs, *gradients))
    assert outputs[2].diagonal(dim1=-2, dim2=-1).mean() <= 1e6


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("norms", ["small", "large", "mixed", "zero", "parallel"])
@pytest.mark.parametrize("alpha", [None, 0.9, 0.5, 0.0])
def test_float32_stays_finite_where_its_digits_do_not_suffice(norms, alpha, backend):
    T, width = 200, 8
    key = normalize(torch.randn(1, T, 2, width), dim=-1)
    size = {"small": 1e-3, "large": 1e3, "mixed": 10 ** (6 * torch.rand(1, T, 2, 1) - 3), "zero": 0.0, "parallel": 1e3}[norms]
    key = (key[:, :1] if norms == "parallel" else key) * size * torch.ones(1, T, 2, 1)
    log_decay = None if alpha is None else torch.full((1, T, 2), alpha).log()
    initial = 100 * torch.eye(width).expand(1, 2, width, width)
    leaves = [None if leaf is None else leaf.clone().requires_grad_() for leaf in (key, torch.ones(1, T, 2), log_decay, initial)]
    outputs = inverse_gram_scan(*leaves, after=key, backend=backend)
    given = [leaf for leaf in leaves if leaf is not None]
    gradients = torch.autograd.grad(sum(x.sum() for x in outputs), given)
    assert all(torch.isfinite(x).all() for x in (*outputs, *gradients))


@pytest.mark.parametrize("gate", ["none", "mild"])
def test_float32_is_as_good_as_its_digits(gate):
    """Unit keys: the products' float32 against float64."""
    x = {name: None if value is None else value.float() for name, value in inputs(300, gate).items()}
    x["key"] = normalize(x["key"], dim=-1)
    wide = {name: None if value is None else value.double() for name, value in x.items()}
    for found, expected in zip(inverse_gram_scan(**x), inverse_gram_scan(**wide), strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_no_tokens_half_precision_and_autocast(backend):
    empty = inputs(0)
    seen, updated, final = inverse_gram_scan(**empty, backend=backend)
    assert seen.shape == updated.shape == (B, 0, H, K)
    torch.testing.assert_close(final, empty["initial"])
    coarse = {name: value.bfloat16() for name, value in inputs(20).items()}
    assert {x.dtype for x in inverse_gram_scan(**coarse, backend=backend)} == {torch.float32}
    x = inputs(20, dtype=torch.float32)
    x["key"].requires_grad_()
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            outputs = inverse_gram_scan(**x, backend=backend)
            results.append([*outputs, *torch.autograd.grad(sum(y.sum() for y in outputs), x["key"])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_it_is_deterministic():
    x = inputs(100, "strong", dtype=torch.float32)
    first, second = (inverse_gram_scan(**x) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": torch.ones(B, 4, K)}, r"key: expected shape \[B,T,H,K\] \(4 dimensions\), got \[2, 4, 5\]"),
        ({"beta": torch.ones(B, 4, H, 1)}, r"beta: expected shape \[B,T,H\] = \[2, 4, 3\], got \[2, 4, 3, 1\]"),
        ({"log_decay": torch.ones(B, 4)}, r"log_decay: expected shape \[B,T,H\]"),
        ({"initial": None}, r"initial: expected P_0 of shape \[B,H,K,K\] = \[2, 3, 5, 5\], positive definite, got None"),
        ({"initial": torch.ones(B, H, K)}, r"initial: expected shape \[B,H,K,K\] = \[2, 3, 5, 5\], got \[2, 3, 5\]"),
        ({"initial": torch.ones(B, H, K, K, device="meta")}, r"initial: expected device cpu \(that of key\), got meta"),
        ({"before": torch.ones(B, 4, H, K)}, r"before: expected dtype torch.float64 \(that of key\), got torch.float32"),
        ({"after": torch.ones(B, 3, H, K)}, r"after: expected shape \[B,T,H,K\] = \[2, 4, 3, 5\], got \[2, 3, 3, 5\]"),
        ({"limit": 0}, r"limit: expected a number over 0, the largest mean diagonal of P, got 0"),
        ({"limit": None}, r"limit: expected a number over 0"),
        ({"limit": math.nan}, r"limit: expected a number over 0"),
        ({"chunk_size": 0}, r"chunk_size: expected a whole number"),
        ({"backend": "trch"}, r"backend: unknown backend 'trch'. Did you mean 'torch'"),
    ],
)
def test_what_is_wrong_is_named(options, message):
    with pytest.raises(UserError, match=f"^{message}"):
        inverse_gram_scan(**{**inputs(4), **options})


@pytest.mark.parametrize("gate", ["none", "mild"])
def test_a_planted_fault_is_found(gate, both, equal, monkeypatch):
    factors = gram_blocks._factors

    def faulty(*arguments):
        B, L, W = factors(*arguments)
        return B, L, W * (1 + 1e-7)

    monkeypatch.setattr(gram_blocks, "_factors", faulty)
    x = inputs(33, gate)
    with pytest.raises(AssertionError, match="output"):
        equal(both(joined, x, backend="torch"), both(joined, x, backend="reference"), 1e-9)
