"""One decoded token against the equations, and layers that decode against the same layers reading, in float64.

The loops are compiled once for all sizes, seconds for a dtype: small tensors, many cases.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deltalab import Mixer, registry
from deltalab.kernels import decode, reference
from deltalab.kernels.decode import Law, Layer, Multiplier, Terms
from deltalab.recurrences.gates import ScalarGate

B, H, K, V, W, D = 2, 3, 5, 7, 4, 11
C = H * (2 * K + V)
F64 = torch.float64


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


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


Ruled = tuple[Law | None, Terms, Tensor]
"""A law, its terms, and what it should give."""


def projected(weight: bool, x: Tensor, rows: int) -> tuple[Terms, Tensor]:
    """(terms, z): z = W x from its weight, or z itself."""
    W, z = draw(rows, D), 9 * draw(B, 1, rows)
    return (Terms(weight=W), x @ W.T) if weight else (Terms(z), z)


def softplus_law(x: Tensor, rows: int, weight: bool) -> Ruled:
    (terms, z), bias, A_log = projected(weight, x, rows), draw(rows), draw(H)
    A = A_log.exp().repeat_interleave(rows // H)
    law = Law("softplus", per_channel=rows > H)
    return law, terms._replace(bias=bias, A_log=A_log), -A * F.softplus(z + bias)


def bounded_law(x: Tensor, rows: int, weight: bool) -> Ruled:
    (terms, z), bias, A_log = projected(weight, x, rows), draw(rows), draw(H)
    A = A_log.exp().repeat_interleave(rows // H)
    law = Law("bounded", low=-5.0, per_channel=rows > H)
    return law, terms._replace(bias=bias, A_log=A_log), -5 * torch.sigmoid(A * (z + bias))


def sigmoid_law(x: Tensor, rows: int, weight: bool) -> Ruled:
    (terms, z), bias = projected(weight, x, rows), draw(rows)
    return Law("sigmoid", 0.2, 1.7), terms._replace(bias=bias), 0.2 + 1.5 * torch.sigmoid(z + bias)


def log_sigmoid_law(x: Tensor, rows: int, weight: bool) -> Ruled:
    terms, z = projected(weight, x, rows)
    return Law("log_sigmoid", high=16.0, per_channel=rows > H), terms, F.logsigmoid(z) / 16


GATES: dict[str, Any] = {
    "none": lambda x, weight: (None, Terms(), None),
    "softplus": lambda x, weight: softplus_law(x, H, weight),
    "bounded": lambda x, weight: bounded_law(x, H, weight),
    "log_sigmoid": lambda x, weight: log_sigmoid_law(x, H, weight),
    "channel": lambda x, weight: softplus_law(x, H * K, weight),
    "bounded_channel": lambda x, weight: bounded_law(x, H * K, weight),
}


@dataclass
class Preconditioned:
    told: Multiplier | None
    laws: tuple[Terms, Terms] = (Terms(), Terms())
    statistic: Tensor | None = None
    centre: Tensor | None = None
    m: Tensor | float = 1.0
    after: Tensor | None = None


def preconditioned(kind: str, x: Tensor, key: Tensor, beta: Tensor, forgets: bool, side: str, weight: bool) -> Preconditioned:
    """What the token is told, m, and the statistic after it."""
    if kind == "none":
        return Preconditioned(None)
    A, centre, one = 2 * torch.rand(B, H, K, dtype=F64), draw(H), torch.ones(B, 1, H, dtype=F64)
    forget, forgetting, log_gamma = log_sigmoid_law(x, H, weight) if forgets else (None, Terms(), 0 * one)
    gain, gaining, g = sigmoid_law(x, H, weight) if forgets else (None, Terms(), one)
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
        x, mixed, past, w, S = draw(B, 1, D), draw(B, 1, C), draw(B, W - 1, C), draw(W, C), draw(B, H, K, V)
        law, terms, log_decay = GATES[gate](x, weight)
        step, stepping, beta = sigmoid_law(x, H, weight) if forgets else (None, Terms(), torch.ones(B, 1, H, dtype=F64))
        eps_q, eps_k = (0.1, 0.01) if weight else (None, None)
        y = F.silu(sum(w[i] * torch.cat([past, mixed], 1)[:, W - 1 - i] for i in range(W)))
        q, k, v = (part.view(B, 1, H, -1) for part in y.split([H * K, H * K, H * V], dim=-1))
        q, k = units(q, eps_q), units(k, eps_k)
        p = preconditioned(kind, x, k, beta, forgets, side, weight)
        layer, gain = Layer(H, K, V, law, step, p.told, erase, eps_q, eps_k, 1e-3), draw(V) if erase else None
        given = [mixed, past, w, S, *([] if p.statistic is None else [p.statistic])]
        before = [tensor.clone() for tensor in given]
        with torch.no_grad():
            laws = [terms, stepping, *p.laws]
            o, kept, state, after = decode.token(layer, x, mixed, past, w, S, laws, gain, p.statistic, p.centre)
        if gate.endswith("channel"):
            log_decay = log_decay.view(B, 1, H, K)
        write, query = beta[..., None] * (p.m if side != "query" else 1.0) * k, (p.m if side != "write" else 1.0) * q
        expected, new = reference.delta_rule(query, k if erase else None, write, v, log_decay, S, K**-0.5)
        close(o.view(B, 1, H, V), norm(expected, gain, 1e-3))
        close(state, new)
        close(kept, torch.cat([past, mixed], 1)[:, 1:])
        assert (after is None) == (p.after is None)
        if after is not None:
            close(after, p.after)
        assert all(torch.equal(one, was) for one, was in zip(given, before, strict=True))


def test_what_is_not_contiguous_or_not_of_the_states_dtype() -> None:
    x, mixed, past, w, S = draw(B, 1, D), draw(B, 1, C), draw(B, W - 1, C), draw(W, C), draw(B, H, K, V)
    law, terms, _ = softplus_law(x, H, True)
    layer, rest = Layer(H, K, V, law, None, Multiplier("hypergradient", eta=0.5)), [Terms()] * 3
    A = torch.rand(K, dtype=F64).expand(B, H, K)

    def scattered(tensor: Tensor) -> Tensor:
        other = tensor.mT.contiguous().mT
        assert not other.is_contiguous()
        return other

    with torch.no_grad():
        expected = decode.token(layer, x, mixed, past, w, S, [terms, *rest], None, A.clone())
        found = decode.token(layer, x, mixed, scattered(past), scattered(w), scattered(S), [terms, *rest], None, A)
        for one, other in zip(found, expected, strict=True):
            close(one, other)
        rounded = terms._replace(bias=terms.bias.float())
        low = decode.token(layer, x, mixed, past, w, S, [rounded, *rest], None, A)[0]
        close(low, decode.token(layer, x, mixed, past, w, S, [rounded._replace(bias=rounded.bias.double()), *rest], None, A)[0])
        assert not torch.equal(low, expected[0])


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


COMPILED = {"deltanet", "gdn", "kda", "osdn", "osdn_apf", "osdn_bounded", "osgdn", "oskda", "pdn", "pgdn", "pkda", "pla"}
"""The cards whose token is one compiled call; the others' recurrence is."""
RECURRENCES = [name for name in registry.names() if name not in ("softmax", "sliding_window")]


@pytest.mark.parametrize("card", RECURRENCES)
def test_a_layer_decodes_as_it_reads(card: str) -> None:
    """Token by token without gradients, after a prompt, is one pass of the definition; no state is changed by its use."""
    blocks: tuple[dict[str, Any], ...] = ({}, {"expand_v": 2.0, "output_gate": "silu"}, {"skip": True}, {"short_conv": 0})
    for block in blocks:
        mixer = Mixer(registry.load(card), width=32, heads=2, seed=1, **block).double()
        x = torch.randn(2, 9, 32, dtype=F64)
        assert (mixer.compiled() is not None) == (card in COMPILED and not {"skip", "short_conv"} & block.keys())
        with torch.no_grad(), torch.inference_mode(block == {}):
            mixer.backend = "reference"
            whole, final = mixer(x, state=mixer.initial_state(2))
            y, state = mixer(x[:, :3], state=mixer.initial_state(2))
            mixer.backend, outputs = "auto", [y]
            for t in range(3, 9):
                before = [tensor.clone() for tensor in state.tensors()]
                y, after = mixer(x[:, t : t + 1], state=state)
                assert all(torch.equal(one, other) for one, other in zip(before, state.tensors(), strict=True))
                outputs.append(y)
                state = after
        close(torch.cat(outputs, dim=1), whole)
        for one, other in zip(state.tensors(), final.tensors(), strict=True):
            close(one, other)


def test_a_planted_fault_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = decode._numbers
    monkeypatch.setattr(decode, "_numbers", lambda dtype, first, *others: numbers(dtype, first * (1 + 1e-9), *others))
    with pytest.raises(AssertionError):
        test_a_token_is_its_equation("none", "none")
    with pytest.raises(AssertionError):
        test_a_layer_decodes_as_it_reads("retnet")


def test_options_and_components_that_the_token_does_not_know() -> None:
    """They go the general way: another class may have another law, whatever it derives from."""

    def compiled(card: Any, **block: Any) -> bool:
        return Mixer(registry.load(card), width=32, heads=2, **block).compiled() is not None

    assert compiled("pgdn")
    changes = {"control": "mean", "squash": "tanh", "normalise": "regularised", "current": False, "interval": "below"}
    for change in ({name: value} for name, value in changes.items()):
        assert not compiled({"card": "pgdn", "preconditioner": {"name": "diagonal", **change}})
    assert not compiled({"card": "pgdn", "forgetting": {"name": "gated", "anchor": "one"}})
    assert not compiled("gdn", value_activation="none")


class Other(ScalarGate):
    """log a_t = 2 (the law of `scalar`)"""

    def forward(self, x: Tensor) -> Any:
        log_decay, dt = self.log_decay_and_dt(x)
        return super().forward(x)._replace(log_decay=2 * log_decay, dt=dt)


def test_what_a_user_changes_in_a_layer_counts() -> None:
    """Another gate, an adapter around a projection, a hook: a token says the same with and without gradients."""
    x = torch.randn(2, 1, 32, dtype=F64)

    def same(mixer: Any) -> None:
        expected, _ = mixer(x, state=state)
        with torch.no_grad():
            found, _ = mixer(x, state=state)
        close(found, expected.detach())

    mixer = Mixer(registry.load("pgdn"), width=32, heads=2, seed=0).double()
    with torch.no_grad():
        _, state = mixer(torch.randn(2, 3, 32, dtype=F64), state=mixer.initial_state(2))
    same(mixer)
    assert mixer.compiled() is not None
    plain = mixer.gate
    mixer.gate = Other(plain.config, plain.shape).double()
    mixer.gate.load_state_dict(plain.state_dict())
    assert mixer.compiled() is None
    same(mixer)
    mixer.gate = plain
    assert mixer.compiled() is not None
    mixer.gate.proj = torch.nn.Sequential(mixer.gate.proj, torch.nn.Tanh())
    same(mixer)
    handle = mixer.step_size.proj.register_forward_hook(lambda module, given, z: z + 1)
    same(mixer)
    handle.remove()
    handle = mixer.step_size.register_forward_hook(lambda module, given, step: step._replace(beta=step.beta / 2))
    assert mixer.compiled() is None
    same(mixer)
    handle.remove()
    same(copy.deepcopy(mixer))


@pytest.mark.parametrize("card", ["gdn", "oskda", "kla"])
def test_float32_half_precision_and_threads(card: str) -> None:
    """float32 as near to float64 as the definition is; a bfloat16 model takes the general way; the same bits from any number of
    threads."""
    mixer = Mixer(registry.load(card), width=256, heads=4, seed=0)
    x, threads = torch.randn(8, 3, 256), torch.get_num_threads()
    with torch.no_grad():
        wide = Mixer(registry.load(card), width=256, heads=4, backend="reference", seed=0).double()
        exact, final = wide(x.double(), state=wide.initial_state(8))
        results = []
        try:
            for number in (1, 2):
                torch.set_num_threads(number)
                state, outputs = mixer.initial_state(8), []
                for t in range(3):
                    y, state = mixer(x[:, t : t + 1], state=state)
                    outputs.append(y)
                results.append([torch.cat(outputs, dim=1), *state.tensors()])
        finally:
            torch.set_num_threads(threads)
        assert (results[0][0] - exact).norm() < 2e-6 * exact.norm()
        assert (state.memory - final.memory).norm() < 2e-6 * final.memory.norm()
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
        half = mixer.bfloat16()
        y, state = half(x[:, :1].bfloat16(), state=half.initial_state(8))
    assert (y.dtype, state.memory.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_backend_chosen_by_name_is_kept(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(decode, "token", refuse)
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
