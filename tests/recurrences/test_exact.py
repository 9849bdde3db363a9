"""The theorem of exact preconditioning (recurrences.md, section 3), for every t, and where it ends.

    G_t = gamma_t G_{t-1} + c_t k_t k_t^T     C_t = gamma_t C_{t-1} + c_t k_t v_t^T     G_0 = Lambda, C_0 = 0
    delta rule with write keys c_t G_t^-1 k_t, its state never decayed     =>     S_t = G_t^-1 C_t

so the inverse Gram matrix on the write key of the delta rule is the same as on the query of linear attention. Every diagonal
approximation must fail this.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from deltalab.kernels import delta_rule, gram_solve, inverse_gram_scan

from .support import EXACTLY, mixer_of, tokens

FORGETTINGS: dict[str, Any] = {
    "never": "none",
    "constant": {"name": "constant", "gamma": 0.8},
    "learned": {"name": "learned", "bias": 1.0},
    "token": {"name": "token", "bias": 1.0},
    "gated": "gated",
}
STEPS = ("one", "sigmoid", {"name": "inverse_time", "law": "reciprocal"}, "kaczmarz")
BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch"])


def signals(mixer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(q, k, v, c, gamma, Lambda) as the layer's components make them; T first for the numbers per token."""
    q, _, k, v, _ = mixer._project(x, None)
    position = (torch.zeros(len(x), dtype=torch.int64),) if mixer.step_size.needs_position else ()
    step = mixer.step_size(x, k, mixer.gate(x), *position)
    forget = mixer.forgetting(x, None)
    c = torch.ones_like(v[..., 0]) if step.beta is None else step.beta
    c = c if forget.gain is None else c * forget.gain
    gamma = torch.ones_like(c) if forget.log_decay is None else forget.log_decay.exp()
    v = v if step.value_gain is None else v * step.value_gain[..., None]
    ridge = 0.25 + softplus(mixer.preconditioner.ridge)
    return q, step.key, v, c, gamma, ridge


def least_squares(k: Any, v: Any, c: Any, gamma: Any, ridge: Any) -> list[Any]:
    """[G_t^-1 C_t] of one head, by building G_t and inverting it at every token."""
    G, C, found = np.diag(ridge), np.zeros((k.shape[1], v.shape[1])), []
    for t in range(len(k)):
        G = gamma[t] * G + c[t] * np.outer(k[t], k[t])
        C = gamma[t] * C + c[t] * np.outer(k[t], v[t])
        found.append(np.linalg.inv(G) @ C)
    return found


@BACKENDS
@pytest.mark.parametrize("forgetting", FORGETTINGS)
@pytest.mark.parametrize("step", STEPS, ids=str)
def test_the_memory_is_least_squares_at_every_token(step: Any, forgetting: str, backend: str) -> None:
    mixer = mixer_of({"card": "rls", "step_size": step, "forgetting": FORGETTINGS[forgetting]}, expand_v=2.0)
    mixer.backend = backend
    x = tokens(length=11)
    with torch.no_grad():
        _, k, v, c, gamma, ridge = signals(mixer, x)
        expected = {
            (b, h): least_squares(*(z[b, :, h].numpy() for z in (k, v, c, gamma)), ridge[h].numpy())
            for b in (0, 1)
            for h in (0, 1)
        }
        state = mixer.initial_state(2)
        for t in range(11):
            _, state = mixer(x[:, t : t + 1], state=state)
            for (b, h), solutions in expected.items():
                np.testing.assert_allclose(state.memory[b, h].numpy(), solutions[t], rtol=1e-9, atol=1e-10)
        _, whole = mixer(x, state=mixer.initial_state(2))
        torch.testing.assert_close(whole.memory, state.memory, **EXACTLY)


@BACKENDS
def test_both_sides_are_one_layer(backend: str) -> None:
    """`rls` == linear attention that is read with (G_t)^-1 q, for every t: outputs and every gradient, weights beta_t too."""
    for step in ("one", "sigmoid"):
        write = mixer_of({"card": "rls", "step_size": step})
        query = mixer_of(
            {"card": "rls", "step_size": step, "erase": "none", "preconditioner": {"name": "exact", "side": "query"}}
        )
        query.load_state_dict(write.state_dict())
        found = []
        for mixer in (write, query):
            mixer.backend = backend
            torch.manual_seed(0)
            x = tokens(length=17).requires_grad_()
            y = mixer(x)
            y.square().sum().backward()
            found.append([y, x.grad, *(parameter.grad for parameter in mixer.parameters())])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@BACKENDS
@pytest.mark.parametrize("forgets", [False, True])
def test_both_sides_of_the_kernels(forgets: bool, backend: str) -> None:
    """With forgetting: Lambda is forgotten with the rest, and the state of the write side is not multiplied by gamma."""
    B, T, H, K, V = 2, 70, 2, 4, 3
    q, k = torch.randn(2, B, T, H, K, dtype=torch.float64)
    v, c = torch.randn(B, T, H, V, dtype=torch.float64), torch.rand(B, T, H, dtype=torch.float64)
    log = -0.3 * torch.rand(B, T, H, dtype=torch.float64) if forgets else None
    ridge = 0.5 + torch.rand(H, K, dtype=torch.float64)
    first = ridge.diag_embed().expand(B, -1, -1, -1)
    before, after, _ = inverse_gram_scan(k, c, log, first.inverse(), after=k, backend=backend)
    o, state = delta_rule(q, k, c[..., None] * after, v, scale=1.0, backend=backend)
    tiny = torch.full_like(ridge, 1e-30)
    solved, G = gram_solve(q, k, c, log, ridge=tiny, initial=first, backend=backend)
    other, C = delta_rule(solved, None, c[..., None] * k, v, log, scale=1.0, erase=False, backend=backend)
    torch.testing.assert_close(o, other, **EXACTLY)
    torch.testing.assert_close(state, torch.linalg.solve(G, C), **EXACTLY)
    # Sherman-Morrison: k~ = P_{t-1} k / (alpha + c k^T P_{t-1} k) = P_t k.
    alpha = torch.ones_like(c) if log is None else log.exp()
    shrunk = before / (alpha + c * (k * before).sum(-1))[..., None]
    torch.testing.assert_close(after, shrunk, **EXACTLY)


def both_sides(preconditioner: dict[str, Any], **sizes: Any) -> tuple[Tensor, Tensor]:
    """The preconditioner on the write key of the delta rule, and on the query of linear attention; before norm and projection."""
    card = {"card": "rls", "block": {"output_norm": False}}
    left = mixer_of({**card, "preconditioner": {**preconditioner, "side": "write"}}, **sizes)
    right = mixer_of({**card, "erase": "none", "preconditioner": {**preconditioner, "side": "query"}}, **sizes)
    right.load_state_dict(left.state_dict())
    torch.manual_seed(0)
    x = tokens(length=20)
    return left(x), right(x)


@pytest.mark.parametrize(
    "preconditioner",
    [
        {"name": "diagonal"},
        {"name": "diagonal", "squash": "none", "normalise": "regularised", "current": False},
        {"name": "diagonal_raw"},
        {"name": "diagonal_raw", "normalise": "none"},
        {"name": "accumulate"},
        {"name": "hypergradient", "initial": 1.0},
        {"name": "exact", "control": "mean"},
        {"name": "exact", "control": "shuffle"},
    ],
    ids=str,
)
def test_an_approximation_is_not_the_same_on_both_sides(preconditioner: dict[str, Any]) -> None:
    left, right = both_sides(preconditioner)
    assert (left - right).norm() > 0.1 * right.norm()


def test_the_exact_one_is_the_same_on_both_sides() -> None:
    left, right = both_sides({"name": "exact"})
    torch.testing.assert_close(left, right, **EXACTLY)


def test_a_diagonal_of_one_channel_is_exact() -> None:
    """1 / (A_{t-1} + lambda), divided by 1 + k^T m k, is 1 / (A_t + lambda): where there is one channel, all of it."""
    block = {"output_norm": False, "head_width": 1, "expand_v": 4.0}
    raw = mixer_of({"card": "rls", "preconditioner": "diagonal_raw"}, **block)
    exact = mixer_of({"card": "rls", "preconditioner": {"name": "exact", "floor": 0.0}}, **block)
    held = raw.state_dict()
    held["preconditioner.ridge"] = held["preconditioner.ridge"][:, None]
    exact.load_state_dict(held)
    x = tokens(length=20)
    torch.testing.assert_close(raw(x), exact(x), **EXACTLY)


def test_a_gate_makes_the_write_side_a_heuristic() -> None:
    """With a decayed state it is no longer the least squares solution: PGDN's kind of step (and the spec says so)."""
    card = {"card": "rls", "gate": "scalar", "forgetting": "tied"}
    left = mixer_of({**card}, output_norm=False)
    right = mixer_of({**card, "erase": "none", "preconditioner": {"name": "exact", "side": "query"}}, output_norm=False)
    right.load_state_dict(left.state_dict())
    x = tokens(length=20)
    assert (left(x) - right(x)).norm() > 0.1 * right(x).norm()
    assert any("the write side is a heuristic" in warning for warning in left.spec.warnings())


@pytest.mark.parametrize("iterations", [1, 2, 6])
def test_as_many_conjugate_gradients_as_channels_are_enough(iterations: int) -> None:
    """6 channels: fewer iterations are an approximation that gets better, 6 the solution up to rounding."""
    solution = mixer_of("mesanet", heads=2, lively=True)
    fewer = mixer_of({"card": "mesanet", "preconditioner": {"iterations": iterations}})
    solution.backend = "reference"  # a direct solve
    x = tokens(length=20)
    error = (fewer(x) - solution(x)).norm() / solution(x).norm()
    bounds = {1: (1e-4, 0.3), 2: (1e-6, 0.03), 6: (0, 1e-10)}
    assert bounds[iterations][0] <= error <= bounds[iterations][1]
