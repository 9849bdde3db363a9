"""Step sizes and gates (recurrences.md, section 2, invariants 2 and 7): each is its definition, and their special cases meet."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.linalg import expm
from torch import Tensor
from torch.nn.functional import normalize, softplus

from deltalab.kernels import delta_rule
from deltalab.recurrences import HeadShape, choose
from deltalab.recurrences.signals import GateOutput, Step

from .support import EXACTLY, mixer_of, tokens

B, T, H, K, V, D = 2, 9, 2, 3, 4, 5
LENGTHS = pytest.mark.parametrize("length", [1e-3, 1.0, 30.0, 1e3])
RANGES = pytest.mark.parametrize("span", [[0.0, 1.0], [0.0, 2.0], [0.5, 1.5]], ids=str)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def stepper(name: str, span: list[float], **options: Any) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """A step size with random parameters, and b_t = low + (high - low) sigmoid(W x + bias) of it."""
    module = choose("step_size", {"name": name, "range": span, **options}).build(HeadShape(D, H, K, V)).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    bias = module.proj.bias if module.proj.bias is not None else 0.0
    return module, lambda x: span[0] + (span[1] - span[0]) * torch.sigmoid(x @ module.proj.weight.T + bias)


def run_layer(step: Step, q: Tensor, v: Tensor, log_decay: Tensor | None, erase: bool = True) -> tuple[Tensor, Tensor]:
    """What the mixer does with a step: write beta * key, gain * v."""
    assert step.beta is not None
    assert step.value_gain is not None
    write = step.beta[..., None] * step.key
    return delta_rule(q, step.key, write, v * step.value_gain[..., None], log_decay, scale=1.0, erase=erase)


def assert_read(o: Tensor, state: Tensor, S: list[Tensor], q: Tensor) -> None:
    """The outputs and the last state are those of the states S_1 ... S_T."""
    expected = torch.stack([torch.einsum("bhkv,bhk->bhv", one, q[:, t]) for t, one in enumerate(S)], dim=1)
    torch.testing.assert_close(o, expected, rtol=1e-9, atol=1e-9 * max(1.0, expected.abs().max().item()))
    torch.testing.assert_close(state, S[-1], rtol=1e-9, atol=1e-9 * max(1.0, S[-1].abs().max().item()))


@LENGTHS
@RANGES
def test_kaczmarz_through_unit_keys_is_its_raw_definition(length: float, span: list[float]) -> None:
    """S_t = a S_{t-1} + eta k/(|k|^2+eps) (v - (a S_{t-1})^T k)^T with RAW keys, token by token, against the identity."""
    module, eta = stepper("kaczmarz", span)
    x, key, q, v = normal(B, T, D), length * normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, V)
    log_decay = -torch.rand(B, T, H, dtype=torch.float64)
    step = module(x, key, GateOutput(log_decay))
    S, states = torch.zeros(B, H, K, V, dtype=torch.float64), []
    for t in range(T):
        k, S = key[:, t], S * log_decay[:, t].exp()[..., None, None]
        strength = eta(x)[:, t] / (k.square().sum(-1) + 1e-6)
        S = S + torch.einsum("bh,bhk,bhv->bhkv", strength, k, v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k))
        states.append(S)
    assert_read(*run_layer(step, q, v, log_decay), states, q)
    assert (step.key.norm(dim=-1) <= 1).all()


@LENGTHS
def test_a_full_kaczmarz_step_answers_exactly(length: float) -> None:
    """eta = 1, eps -> 0: the memory's answer to k_t is v_t, by the smallest change that achieves it."""
    module, _ = stepper("kaczmarz", [0.0, 1.0], eps=1e-30)
    with torch.no_grad():
        module.proj.weight.zero_()
        module.proj.bias.fill_(50)
    key, v = length * normal(1, 2, H, K), normal(1, 2, H, V)
    step = module(normal(1, 2, D), key, GateOutput(None))
    before = run_layer(Step(*(None if part is None else part[:, :1] for part in step)), key[:, :1], v[:, :1], None)[1]
    o, state = run_layer(step, key, v, None)
    torch.testing.assert_close(o, v, rtol=1e-9, atol=1e-9)
    k = key[0, 1]
    smallest = torch.einsum(
        "hk,hv->hkv", k / k.square().sum(-1, keepdim=True), v[0, 1] - torch.einsum("hkv,hk->hv", before[0], k)
    )
    torch.testing.assert_close(state[0] - before[0], smallest, rtol=1e-9, atol=1e-9 / length)


@LENGTHS
@RANGES
def test_efla_is_the_exact_flow(length: float, span: list[float]) -> None:
    """S_t = the solution of dS/ds = k (v - S^T k)^T after a time b_t, by the exponential of its generator, with raw keys."""
    module, time = stepper("efla", span)
    x, key, q, v = normal(1, 5, D), length * normal(1, 5, H, K), normal(1, 5, H, K), normal(1, 5, H, V)
    b, states = time(x), []
    S = torch.zeros(H, K, V, dtype=torch.float64)
    for t in range(5):
        rows = []
        for h in range(H):
            k, generator = key[0, t, h], torch.zeros(K + V, K + V, dtype=torch.float64)
            generator[:K, :K], generator[:K, K:] = -torch.outer(k, k), torch.outer(k, v[0, t, h])
            flow = torch.from_numpy(expm((b[0, t, h] * generator).detach().numpy()))
            rows.append(flow[:K, :K] @ S[h] + flow[:K, K:])
        S = torch.stack(rows)
        states.append(S[None])
    step = module(x, key, GateOutput(None))
    o, state = run_layer(step, q, v, None)
    if length == 1e3:  # the exponential of a matrix of norm 1e6 is itself good to five digits
        torch.testing.assert_close(state, states[-1], rtol=1e-4, atol=1e-6)
        return
    assert_read(o, state, states, q)
    assert (step.beta * step.key.square().sum(-1) < 1 + 1e-12).all()


@LENGTHS
@RANGES
def test_longhorn_without_its_gate_is_the_proximal_step(length: float, span: list[float]) -> None:
    """S_t = argmin |S - a S_{t-1}|^2 + b |v - S^T k|^2 = (I + b k k^T)^-1 (a S_{t-1} + b k v^T), solved as it stands."""
    module, strength = stepper("longhorn", span, own_gate=False)
    x, key, q, v = normal(B, T, D), length * normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, V)
    log_decay = -torch.rand(B, T, H, dtype=torch.float64)
    S, states = torch.zeros(B, H, K, V, dtype=torch.float64), []
    for t in range(T):
        b, k = strength(x)[:, t][..., None, None], key[:, t]
        system = torch.eye(K, dtype=torch.float64) + b * k[..., :, None] * k[..., None, :]
        decayed = log_decay[:, t].exp()[..., None, None] * S
        S = torch.linalg.solve(system, decayed + b * k[..., :, None] * v[:, t][..., None, :])
        states.append(S)
    assert_read(*run_layer(module(x, key, GateOutput(log_decay)), q, v, log_decay), states, q)


@LENGTHS
@RANGES
def test_longhorn_sets_the_gate(length: float, span: list[float]) -> None:
    """S_t = Diag(1 - D k^2) S_{t-1} + D k v^T, D = b / (1 + b |k|^2), with raw keys; the gate never leaves [0, 1]."""
    module, strength = stepper("longhorn", span)
    gate = choose("gate", "none").build(HeadShape(D, H, K, V))
    x, key, q, v = normal(B, T, D), length * normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, V)
    S, states = torch.zeros(B, H, K, V, dtype=torch.float64), []
    for t in range(T):
        b, k = strength(x)[:, t][..., None], key[:, t]
        write = b / (1 + b * k.square().sum(-1, keepdim=True)) * k
        S = (1 - write * k)[..., None] * S + write[..., None] * v[:, t][..., None, :]
        states.append(S)
    step = module(x, key, GateOutput(None))
    log_decay = gate.decay(gate(x), step)
    assert (log_decay <= 0).all()
    o, state = run_layer(step, q, v, log_decay, erase=False)
    # 1 - D k^2 cancels for the definition, not for the product: as many digits as the definition has.
    tolerance = {"rtol": 1e-9 * max(1.0, length), "atol": 1e-9 / min(1.0, length)}
    torch.testing.assert_close(
        o, torch.stack([torch.einsum("bhkv,bhk->bhv", one, q[:, t]) for t, one in enumerate(states)], 1), **tolerance
    )
    torch.testing.assert_close(state, states[-1], **tolerance)


def test_kaczmarz_with_unit_keys_is_the_gated_delta_rule() -> None:
    kaczmarz, _ = stepper("kaczmarz", [0.0, 1.0], eps=1e-18)
    sigmoid, _ = stepper("sigmoid", [0.0, 1.0])
    with torch.no_grad():
        kaczmarz.proj.bias.zero_()
        sigmoid.proj.weight.copy_(kaczmarz.proj.weight)
    x, key = normal(B, T, D), normalize(normal(B, T, H, K), dim=-1)
    left, right = kaczmarz(x, key, GateOutput(None)), sigmoid(x, key, GateOutput(None))
    torch.testing.assert_close(left.key, right.key, **EXACTLY)
    torch.testing.assert_close(left.beta, right.beta, **EXACTLY)
    torch.testing.assert_close(left.value_gain, torch.ones_like(left.beta), **EXACTLY)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
def test_kla_is_gdn_with_values_over_the_keys_length(scale: float) -> None:
    """KLA(k, v, eta) == GDN(k/|k|, v/|k|, eta |k|^2/(|k|^2 + eps)) as whole layers: `value_gain: inverse_norm` alone differs."""
    kla, gdn = mixer_of("kla"), mixer_of({"card": "gdn", "value_gain": "inverse_norm"})
    with torch.no_grad():
        kla.step_size.proj.bias.zero_()
        kla.in_proj.weight[12:24] *= scale
    gdn.load_state_dict({name: value for name, value in kla.state_dict().items() if name != "step_size.proj.bias"})
    x = tokens()
    torch.testing.assert_close(kla(x), gdn(x), **EXACTLY)
    plain = mixer_of("gdn")
    plain.load_state_dict(gdn.state_dict())
    assert not torch.allclose(gdn(x), plain(x), atol=1e-3)


def test_the_skip_of_a_kaczmarz_layer_is_of_the_raw_value() -> None:
    """D * v, where v is the layer's value, not the one divided by |k| for the identity above."""
    with_skip = mixer_of("kla", skip=True, short_conv=0, output_norm=False)
    without = mixer_of("kla", short_conv=0, output_norm=False)
    without.load_state_dict(with_skip.state_dict(), strict=False)
    x = tokens()
    raw = (x @ with_skip.in_proj.weight.T).split(with_skip.sizes, dim=-1)[2]
    v = (raw * torch.sigmoid(raw)).unflatten(-1, (2, 6))
    added = (with_skip.skip.D[:, None] * v).flatten(-2) @ with_skip.out_proj.weight.T
    torch.testing.assert_close(with_skip(x), without(x) + added, **EXACTLY)


def test_kaczmarz_learned_grows_with_the_key() -> None:
    module = choose("step_size", {"name": "kaczmarz_learned", "initial": 0.7}).build(HeadShape(D, H, K, V)).double()
    with torch.no_grad():
        module.c.copy_(torch.tensor([0.3, -1.0]))
    key = normal(B, T, H, K)
    step = module(normal(B, T, D), key, GateOutput(None))
    torch.testing.assert_close(step.beta, softplus(module.c) * key.square().sum(-1), **EXACTLY)
    assert torch.equal(step.key, key)


# Gates ---------------------------------------------------------------------------------------------------------------


def test_retnets_slopes_are_fixed() -> None:
    mixer = mixer_of("retnet", heads=4)
    log_decay = mixer.gate(tokens()).log_decay
    assert not list(mixer.gate.parameters())
    for h, a in enumerate((31 / 32, 63 / 64, 127 / 128, 255 / 256)):
        torch.testing.assert_close(log_decay[:, :, h].exp(), torch.full((2, 9), a, dtype=torch.float64), **EXACTLY)


@pytest.mark.parametrize(
    "step", ["sigmoid", "efla", "kaczmarz", {"name": "longhorn", "own_gate": False}, "inverse_time", "constant"], ids=str
)
def test_the_tied_gate_forgets_what_the_step_writes(step: Any) -> None:
    """a_t = 1 - beta_t, where beta |k|^2 <= 1; that of `efla` is beta (|k|^2 + eps), above 1 by 1e-8 at most."""
    mixer, x = mixer_of({"card": "deltanet", "gate": "tied", "step_size": step}), tokens()
    _, _, k, _, _ = mixer._project(x, None)
    place = (torch.zeros(2, dtype=torch.int64),) if mixer.step_size.needs_position else ()
    taken = mixer.step_size(x, k, GateOutput(None), *place)
    assert taken.beta.max() < 1 + 1e-8
    torch.testing.assert_close(mixer.gate.decay(mixer.gate(x), taken).exp(), (1 - taken.beta).clamp(min=0), **EXACTLY)


def test_the_tied_gate_survives_a_step_of_one() -> None:
    """beta rounds to 1 where its logit is large: the state is gone, the numbers are not."""
    mixer = mixer_of({"card": "deltanet", "gate": "tied"}, lively=False)
    with torch.no_grad():
        mixer.step_size.proj.weight.fill_(1e3)
    x = tokens().abs().requires_grad_()
    mixer(x).sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("bound", [-5.0, -0.5])
def test_a_lower_bound_holds(bound: float) -> None:
    """KDA's safe gate: log a = L sigmoid(exp(A_log) z), never below L, however large its input."""
    mixer, x = mixer_of({"card": "kda", "gate": {"lower_bound": bound}}), 100 * tokens()
    gate = mixer.gate
    z = (x @ gate.down.weight.T @ gate.up.weight.T + gate.dt_bias).unflatten(-1, (2, 6))
    expected = bound * torch.sigmoid(gate.A_log.exp()[:, None] * z)
    found = gate(x).log_decay
    torch.testing.assert_close(found, expected, **EXACTLY)
    assert found.min() < 0.99 * bound
    assert found.min() >= bound
    assert mixer_of("kda").gate(x).log_decay.min() < -5


@pytest.mark.parametrize(
    ("name", "divisor", "bias"), [("scalar_sigmoid", 1.0, 0.0), ("scalar_sigmoid", 16.0, 2.0), ("channel_sigmoid", 16.0, 0.0)]
)
def test_sigmoid_gates(name: str, divisor: float, bias: float) -> None:
    """a_t = sigmoid(z)^(1/divisor), and where they start: 0.5 and 0.958 (and sigmoid(2)^(1/16) = 0.992)."""
    gate = {"name": name, "divisor": divisor, "bias": bias}
    mixer, x = mixer_of({"card": "gdn", "gate": gate}), tokens()
    module = mixer.gate
    z = module.proj(x) if name == "scalar_sigmoid" else module.up(module.down(x)).unflatten(-1, (2, 6))
    torch.testing.assert_close(module(x).log_decay.exp(), torch.sigmoid(z) ** (1 / divisor), **EXACTLY)
    start = mixer_of({"card": "gdn", "gate": gate}, lively=False).gate(torch.zeros_like(x)).log_decay.exp()
    torch.testing.assert_close(start, torch.full_like(start, (1 / (1 + math.exp(-bias))) ** (1 / divisor)), **EXACTLY)
