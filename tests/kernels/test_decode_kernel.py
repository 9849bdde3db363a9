"""One decoded token against its equations in float64. The loops are compiled once for all sizes, seconds for a dtype: small
tensors, many cases. (Layers and models that decode: tests/recurrences/test_decode_compiled.py.)
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deltalab import Mixer, registry
from deltalab.kernels import decode, reference
from deltalab.kernels.cpu.decode_layer import NOTHING, Around, Law, Layer, Multiplier, Part, Product, Step, Weights

B, H, K, V, W, D = 2, 3, 5, 7, 4, 11
C = H * (2 * K + V)
F64 = torch.float64


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def token(layer: Layer, weights: Weights, around: Around | None = None) -> Any:
    """(x, past, state, statistic) -> (y, what of each is next), of one layer."""
    made = decode.Token(Part(layer, weights, around))

    def one(x: Tensor, *before: Any) -> tuple[Any, ...]:
        assert made.serves(x, [before])
        y, [after] = made(x, [before])
        return y, *after

    return one


def norm(o: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    return o if gain is None else F.rms_norm(o, o.shape[-1:], gain, eps)


@pytest.mark.parametrize("gate", ["none", "scalar", "channel"])
@pytest.mark.parametrize("erase", [True, False])
def test_a_step_is_the_definition(gate: str, erase: bool) -> None:
    q, r, w, v, S = draw(B, 1, H, K), draw(B, 1, H, K), draw(B, 1, H, K), draw(B, 1, H, V), draw(B, H, K, V)
    log_decay = {"none": None, "scalar": -draw(B, 1, H).abs(), "channel": -draw(B, 1, H, K).abs()}[gate]
    if log_decay is not None:
        log_decay[0, 0, 1] = -torch.inf
    for gain in (None, draw(V)):
        before = S.clone()
        with torch.no_grad():
            o, after = decode.step(q, r if erase else None, w, v, log_decay, S, 0.3, gain, 1e-3)
        expected, state = reference.delta_rule(q, r if erase else None, w, v, log_decay, S, 0.3)
        close(o, norm(expected, gain, 1e-3))
        close(after, state)
        assert torch.equal(S, before)


Ruled = tuple[Law | None, Product, Tensor]
"""A law, its product, and what it should give."""


def projected(weight: bool, x: Tensor, rows: int) -> tuple[Product, Tensor]:
    """(product, z): z = W x from its weight, of a low rank where it is one per channel, or z itself."""
    W, inner, z = draw(rows, D), draw(2, D), 9 * draw(B, 1, rows)
    if weight and rows > H:
        W = draw(rows, 2)
        return Product(weight=W, inner=inner), x @ inner.T @ W.T
    return (Product(weight=W), x @ W.T) if weight else (Product(z), z)


def softplus_law(x: Tensor, rows: int, weight: bool) -> Ruled:
    (product, z), bias, A_log = projected(weight, x, rows), draw(rows), draw(H)
    A = A_log.exp().repeat_interleave(rows // H)
    law = Law("softplus", per_channel=rows > H)
    return law, product._replace(bias=bias, A_log=A_log), -A * F.softplus(z + bias)


def bounded_law(x: Tensor, rows: int, weight: bool) -> Ruled:
    (product, z), bias, A_log = projected(weight, x, rows), draw(rows), draw(H)
    A = A_log.exp().repeat_interleave(rows // H)
    law = Law("bounded", low=-5.0, per_channel=rows > H)
    return law, product._replace(bias=bias, A_log=A_log), -5 * torch.sigmoid(A * (z + bias))


def sigmoid_law(x: Tensor, rows: int, weight: bool) -> Ruled:
    (product, z), bias = projected(weight, x, rows), draw(rows)
    return Law("sigmoid", 0.2, 1.7), product._replace(bias=bias), 0.2 + 1.5 * torch.sigmoid(z + bias)


def log_sigmoid_law(x: Tensor, rows: int, weight: bool) -> Ruled:
    product, z = projected(weight, x, rows)
    return Law("log_sigmoid", high=16.0, per_channel=rows > H), product, F.logsigmoid(z) / 16


GATES: dict[str, Any] = {
    "none": lambda x, weight: (None, NOTHING, None),
    "softplus": lambda x, weight: softplus_law(x, H, weight),
    "bounded": lambda x, weight: bounded_law(x, H, weight),
    "log_sigmoid": lambda x, weight: log_sigmoid_law(x, H, weight),
    "channel": lambda x, weight: softplus_law(x, H * K, weight),
    "log_sigmoid_channel": lambda x, weight: log_sigmoid_law(x, H * K, weight),
    "bounded_channel": lambda x, weight: bounded_law(x, H * K, weight),
}


@dataclass
class Preconditioned:
    told: Multiplier | None
    laws: tuple[Product, Product] = (NOTHING, NOTHING)
    statistic: Tensor | None = None
    centre: Tensor | None = None
    m: Tensor | float = 1.0
    after: Tensor | None = None


def preconditioned(kind: str, x: Tensor, key: Tensor, beta: Tensor, forgets: bool, side: str, weight: bool) -> Preconditioned:
    """What the token is told, m, and the statistic after it."""
    if kind == "none":
        return Preconditioned(None)
    A, centre, one = 2 * torch.rand(B, H, K, dtype=F64), draw(H), torch.ones(B, 1, H, dtype=F64)
    forget, forgetting, log_gamma = log_sigmoid_law(x, H, weight) if forgets else (None, NOTHING, 0 * one)
    gain, gaining, g = sigmoid_law(x, H, weight) if forgets else (None, NOTHING, one)
    gamma, g, square = log_gamma.exp()[:, 0, :, None], g[:, 0, :, None], key[:, 0].square()
    if kind == "diagonal":
        after = gamma * A + g * square
        r = torch.log(after + 1e-6) - centre[:, None]
        m = torch.exp(-0.4 * r / (1 + r.abs()))
        told = Multiplier("diagonal", side, forget, gain, 0.4)
        return Preconditioned(told, (forgetting, gaining), A, centre, m[:, None], after)
    b = beta[:, 0, :, None] if kind == "aware" else one[:, 0, :, None]
    after = gamma * A + 0.7 * g * b * (1 - b * (A * square).sum(-1, keepdim=True)) * square
    told = Multiplier("hypergradient", side, forget, gain, eta=0.7, aware=kind == "aware", box=(0.3, 1.5))
    return Preconditioned(told, (forgetting, gaining), A, None, A[:, None], after.clamp(0.3, 1.5))


def units(x: Tensor, eps: float | None) -> Tensor:
    return x if eps is None else x / (x.square().sum(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("kind", ["none", "diagonal", "blind", "aware"])
@pytest.mark.parametrize("gate", GATES)
def test_a_token_is_its_equation(gate: str, kind: str) -> None:
    """Against the docstring, written out in torch, for every law, preconditioner, side and option."""
    sides = ("write", "query", "both") if kind != "none" else ("write",)
    for side, forgets, erase, weight in itertools.product(sides, (True, False), (True, False), (True, False)):
        x, past, w, S = draw(B, 1, D), draw(B, W - 1, C), draw(W, C), draw(B, H, K, V)
        mixed, u = projected(weight, x, C)
        law, product, log_decay = GATES[gate](x, weight)
        step, stepping, beta = sigmoid_law(x, H, weight) if forgets else (None, NOTHING, torch.ones(B, 1, H, dtype=F64))
        eps_q, eps_k = (0.1, 0.01) if weight else (None, None)
        y = F.silu(sum(w[i] * torch.cat([past, u], 1)[:, W - 1 - i] for i in range(W)))
        q, k, v = (part.view(B, 1, H, -1) for part in y.split([H * K, H * K, H * V], dim=-1))
        q, k = units(q, eps_q), units(k, eps_k)
        p = preconditioned(kind, x, k, beta, forgets, side, weight)
        reads: Any = "key" if erase else "none"
        layer, gain = Layer(H, K, V, law, Step("plain", step), p.told, reads, eps_q, eps_k, 1e-3), draw(V) if erase else None
        given = [past, w, S, *([] if p.statistic is None else [p.statistic])]
        before = [tensor.clone() for tensor in given]
        weights = Weights(mixed, w, (product, stepping, *p.laws), norm=gain, centre=p.centre)
        with torch.no_grad():
            o, kept, state, after = token(layer, weights)(x, past, S, p.statistic)
        if gate.endswith("channel"):
            log_decay = log_decay.view(B, 1, H, K)
        write, query = beta[..., None] * (p.m if side != "query" else 1.0) * k, (p.m if side != "write" else 1.0) * q
        expected, new = reference.delta_rule(query, k if erase else None, write, v, log_decay, S, K**-0.5)
        close(o.view(B, 1, H, V), norm(expected, gain, 1e-3))
        close(state, new)
        close(kept, torch.cat([past, u], 1)[:, 1:])
        assert (after is None) == (p.after is None)
        if after is not None:
            close(after, p.after)
        assert all(torch.equal(one, was) for one, was in zip(given, before, strict=True))


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("gate", ["none", "softplus", "channel"])
def test_substeps_are_their_equation(n: int, gate: str) -> None:
    """n steps of the definition: the first forgets, the last is read; each with a key, a value and a beta of its own."""
    for weight in (True, False):
        x, S = draw(B, 1, D), draw(B, H, K, V)
        mixed, u = projected(weight, x, H * (K + n * (K + V)))
        law, product, log_decay = GATES[gate](x, weight)
        step, first, beta = sigmoid_law(x, H, weight)
        rest = [sigmoid_law(x, H, weight) for _ in range(n - 1)]
        layer = Layer(H, K, V, law, Step("plain", step), eps_q=None, eps_k=None, activation=("none", "none"), substeps=n)
        later = tuple(product for _, product, _ in rest)
        with torch.no_grad():
            o, _, state, _ = token(layer, Weights(mixed, laws=(product, first, NOTHING, NOTHING), later=later))(x, None, S, None)
        q, k, v = u.split([H * K, n * H * K, n * H * V], dim=-1)
        k, v = k.view(B, n, H, K), v.view(B, n, H, V)
        betas = torch.cat([beta, *(one for _, _, one in rest)], dim=1)
        assert betas.shape == (B, n, H)
        if log_decay is not None:
            log_decay = log_decay.view(B, 1, H, *((K,) if gate == "channel" else ()))
            log_decay = torch.cat([log_decay, *[torch.zeros_like(log_decay)] * (n - 1)], dim=1)
        queries = q.view(B, 1, H, K).expand(-1, n, -1, -1)
        expected, new = reference.delta_rule(queries, k, betas[..., None] * k, v, log_decay, S, K**-0.5)
        close(o.view(B, H, V), expected[:, -1])
        close(state, new)


@pytest.mark.parametrize("kind", ["inverse", "gram"])
@pytest.mark.parametrize("width", [1, 5, 17])
def test_a_matrix_is_the_definitions(kind: Any, width: int) -> None:
    """Of least squares the rules that keep P finite as well: a limit in reach, a P that rounding has made indefinite."""
    for forgets, limit, spoilt in itertools.product((True, False), (1e6, 0.7), (False, kind == "inverse")):
        x, S, root = draw(B, 1, D), draw(B, H, width, V), draw(B, H, width, width)
        A = root @ root.mT / width + 0.1 * torch.eye(width, dtype=F64) * (-1 if spoilt else 1)
        mixed, u = projected(True, x, H * (2 * width + V))
        step, stepping, beta = sigmoid_law(x, H, True)
        forget, forgetting, log_gamma = log_sigmoid_law(x, H, True) if forgets else (None, NOTHING, None)
        gain, gaining, g = sigmoid_law(x, H, True) if forgets else (None, NOTHING, torch.ones_like(beta))
        side, floor, ridge = "query" if kind == "gram" else "write", 0.3, 9 * draw(H, width)
        told = Multiplier(kind, side, forget, gain, limit=limit, floor=floor, iterations=200)
        layer = Layer(H, width, V, None, Step("plain", step), told, "key", None, None, activation=("none", "none"))
        weights = Weights(mixed, laws=(NOTHING, stepping, forgetting, gaining), ridge=ridge)
        before = A.clone()
        with torch.no_grad():
            o, _, state, after = token(layer, weights)(x, None, S, A)
        q, k, v = (part.view(B, 1, H, -1) for part in u.split([H * width, H * width, H * V], dim=-1))
        write = k
        if kind == "gram":
            q, expected = reference.gram_solve(q, k, g * beta, log_gamma, F.softplus(ridge) + floor, A)
        else:
            _, write, expected = reference.inverse_gram_scan(k, g * beta, log_gamma, A, k, k, limit)
            assert write is not None
            write = g[..., None] * write
        read, new = reference.delta_rule(q, k, beta[..., None] * write, v, None, S, width**-0.5)
        assert after is not None
        for found, wanted in ((after, expected), (state, new), (o.view(B, 1, H, V), read)):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
        assert torch.equal(A, before)


def test_what_is_not_contiguous_or_not_of_the_states_dtype() -> None:
    x, mixed, past, w, S = draw(B, 1, D), draw(C, D), draw(B, W - 1, C), draw(W, C), draw(B, H, K, V)
    law, product, _ = softplus_law(x, H, True)
    layer, A = Layer(H, K, V, law, multiplier=Multiplier("hypergradient", eta=0.5)), torch.rand(K, dtype=F64).expand(B, H, K)

    def scattered(tensor: Tensor) -> Tensor:
        other = tensor.mT.contiguous().mT
        assert not other.is_contiguous()
        return other

    def told(mixed: Tensor, w: Tensor, product: Product) -> Any:
        return token(layer, Weights(Product(weight=mixed), w, (product, NOTHING, NOTHING, NOTHING)))

    with torch.no_grad():
        expected = told(mixed, w, product)(x, past, S, A.clone())
        found = told(scattered(mixed), scattered(w), product)(x, scattered(past), scattered(S), A)
        for one, other in zip(found, expected, strict=True):
            close(one, other)
        assert product.bias is not None
        rounded = product._replace(bias=product.bias.float())
        low = told(mixed, w, rounded)(x, past, S, A)[0]
        close(low, told(mixed, w, rounded._replace(bias=product.bias.float().double()))(x, past, S, A)[0])
        assert not torch.equal(low, expected[0])


@pytest.mark.parametrize("sequences", [1, 2, 3, 4, 5, 7, 16, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_and_the_block(sequences: int, dtype: torch.dtype) -> None:
    """y = x + W' o, o = v where there is but one channel and nothing else, then the MLP; for every group of rows and rest."""
    D, heads, V, hidden = 37, 3, 6, 23
    width = heads * (2 + V)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=F64).to(dtype)

    layer = Layer(heads, 1, V, erase="none", eps_q=None, eps_k=None, activation=("none", "none"), output_gate="sigmoid")
    x, mixed, down = some(sequences, 1, D), some(width, D), some(5, D)
    gate, output, up, last = some(heads * V, 5), some(D, heads * V), some(2 * hidden, D), some(D, hidden)
    biases = [some(n) for n in (heads * V, D, 2 * hidden, D)]
    norms = some(D), some(D)
    weights = Weights(
        Product(weight=mixed),
        gate=Product(weight=gate, bias=biases[0], inner=down),
        output=Product(weight=output, bias=biases[1]),
    )
    around = Around(norms[0], 1e-3, norms[1], Product(weight=up, bias=biases[2]), Product(weight=last, bias=biases[3]))
    S = torch.zeros(sequences, heads, 1, V, dtype=dtype)
    with torch.no_grad():
        found, kept, _, _ = token(layer, weights, around)(x, None, S, None)
    assert kept is None
    x, mixed, down, gate, output, up, last = (t.double() for t in (x, mixed, down, gate, output, up, last))
    biases, norms = [b.double() for b in biases], [n.double() for n in norms]
    h = F.rms_norm(x, (D,), norms[0], 1e-3)
    q, k, v = (h @ mixed.T).split([heads, heads, heads * V], dim=-1)
    o = ((q * k).unsqueeze(-1) * v.unflatten(-1, (heads, V))).flatten(-2) * torch.sigmoid(h @ down.T @ gate.T + biases[0])
    y = x + o @ output.T + biases[1]
    g, u = (F.rms_norm(y, (D,), norms[1], 1e-3) @ up.T + biases[2]).chunk(2, dim=-1)
    expected = y + (F.silu(g) * u) @ last.T + biases[3]
    assert (found - expected).norm() < (1e-6 if dtype == torch.float32 else 1e-14) * expected.norm()


def test_the_norm_of_few_rows() -> None:
    x, weight = draw(3, 2, 7), torch.nn.Parameter(draw(7))
    with torch.no_grad():
        close(decode.rms_norm(x, weight, 1e-3), F.rms_norm(x, (7,), weight, 1e-3))
        close(decode.rms_norm(x.transpose(0, 1), weight, 1e-3), F.rms_norm(x.transpose(0, 1), (7,), weight, 1e-3))


def test_where_it_serves() -> None:
    x = torch.ones(2)
    assert not decode.serves(x)  # with gradients
    with torch.no_grad():
        assert decode.serves(x, None, x)
        assert not decode.serves(x, x.double())
        assert not decode.serves(x.bfloat16())
        assert not decode.serves(x.to("meta"))
        with torch.autocast("cpu", torch.bfloat16):
            assert not decode.serves(x)
    with torch.inference_mode():
        assert decode.serves(x)


def test_a_planted_fault_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = decode._numbers
    monkeypatch.setattr(decode, "_numbers", lambda dtype, first, *others: numbers(dtype, first * (1 + 1e-9), *others))
    with pytest.raises(AssertionError):
        test_a_token_is_its_equation("none", "none")


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_backend_chosen_by_name_is_kept(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(decode.Token, "__call__", refuse)
    monkeypatch.setattr(decode, "step", refuse)
    mixer = Mixer(registry.load("gdn"), width=32, heads=2, backend=backend, seed=0)
    with torch.no_grad():
        _, state = mixer(torch.randn(1, 1, 32), state=mixer.initial_state(1))
        mixer.backend = "auto"
        with pytest.raises(AssertionError, match="decoded"):
            mixer(torch.randn(1, 1, 32), state=state)
        narrow = Mixer(registry.load("gdn"), width=16, heads=2, seed=0)
        narrow(torch.randn(1, 1, 16), state=narrow.initial_state(1))
    mixer(torch.randn(1, 1, 32), state=state)[0].sum().backward()
