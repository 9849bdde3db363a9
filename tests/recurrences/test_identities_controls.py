"""The controls of every preconditioner, on every side: what takes its place is of the same size, and nothing else."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from deltalab.recurrences.multipliers import permutation

from .strategies import own
from .support import EXACTLY, mixer_of, tokens
from .test_identities_preconditioners import B, K, assert_same_layer, built, forgetful, same_parameters, told

PRECONDITIONERS = [name for name in own("preconditioner") if name != "none"]
MULTIPLIERS = [name for name in PRECONDITIONERS if name != "exact"]
every_side = pytest.mark.parametrize("side", ["write", "query", "both"])


def outcome(choice: dict[str, Any], parameters: dict[str, Tensor], given: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    module = built(choice)
    module.load_state_dict(parameters)
    with torch.no_grad():
        return tuple(module(given, module.initial_statistic(B)))


@pytest.mark.parametrize("name", MULTIPLIERS)
@every_side
def test_controls_of_a_multiplier(name: str, side: str) -> None:
    """mean: its mean over channels; shuffle: its channels in another, fixed order; constant: one number. The side that is not
    preconditioned is left alone, and the statistic goes on as it would."""
    given, choice = told(forget=forgetful()), {"name": name, "side": side, "constant": 0.7, "normalise": "none"}
    held = built(choice).state_dict()
    key, query, statistic = outcome({**choice, "side": "both"}, held, given)
    m = key / given.key
    torch.testing.assert_close(query / given.query, m, rtol=1e-8, atol=1e-10)
    assert m.std(-1).mean() > 1e-3
    controlled = {
        "none": m,
        "mean": m.mean(-1, keepdim=True).expand_as(m),
        "shuffle": m[..., permutation(K)],
        "constant": torch.full_like(m, 0.7),
    }
    for control, expected in controlled.items():
        found = outcome({**choice, "control": control}, held, given)
        torch.testing.assert_close(found[0], given.key if side == "query" else expected * given.key, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(found[1], given.query if side == "write" else expected * given.query, rtol=1e-8, atol=1e-10)
        if statistic is not None:
            torch.testing.assert_close(found[2], statistic, **EXACTLY)
    assert not torch.equal(permutation(K), torch.arange(K))


@every_side
@pytest.mark.parametrize("forgets", [False, True])
def test_controls_of_the_exact_preconditioner(side: str, forgets: bool) -> None:
    """mean: the scalar with the same gain along the vector; shuffle: the inverse with its features permuted; constant."""
    given = told(forget=forgetful()) if forgets else told()
    choice: dict[str, Any] = {"name": "exact", "side": side, "constant": 0.7}
    held = built(choice).state_dict()
    matrices = inverse_matrices(choice, held, given)
    gain = given.forget.gain[..., None] if forgets else 1.0
    order = permutation(K)
    for control in ("none", "mean", "shuffle", "constant"):
        found = outcome({**choice, "control": control}, held, given)
        for place, vector, acts, factor in (
            (0, given.key, side != "query", gain),
            (1, given.query, side != "write", 1.0),
        ):
            solved = torch.einsum("bthij,bthj->bthi", matrices, vector)
            along = (vector * solved).sum(-1, keepdim=True) / vector.square().sum(-1, keepdim=True)
            permuted = torch.einsum("bthij,bthj->bthi", matrices[..., order.argsort(), :][..., order.argsort()], vector)
            expected = {"none": solved, "mean": along * vector, "shuffle": permuted, "constant": 0.7 * vector}[control]
            torch.testing.assert_close(found[place], factor * expected if acts else vector, rtol=1e-8, atol=1e-9)


def inverse_matrices(choice: dict[str, Any], held: dict[str, Tensor], given: Any) -> Tensor:
    """[B,T,H,K,K] (G_t)^-1, Lambda forgotten on the write side and added anew on the query side, inverted one by one."""
    ridge = (0.25 + torch.log1p(held["ridge"].exp())).diag_embed()
    query_side = choice["side"] == "query"
    G, found = torch.zeros_like(ridge) if query_side else ridge, []
    c = given.beta if given.forget.gain is None else given.beta * given.forget.gain
    for t in range(given.key.shape[1]):
        if given.forget.log_decay is not None:
            G = G * given.forget.log_decay[:, t].exp()[..., None, None]
        k = given.key[:, t]
        G = G + c[:, t][..., None, None] * k[..., :, None] * k[..., None, :]
        found.append(torch.linalg.inv(G + ridge if query_side else G))
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("name", PRECONDITIONERS)
@every_side
def test_a_constant_of_one_is_no_preconditioner(name: str, side: str) -> None:
    """As whole layers: on both sides, whatever the statistic does meanwhile."""
    choice = {"name": name, "side": side, "control": "constant", "constant": 1.0}
    choice |= {"normalise": "none"} if name != "exact" else {}
    left, right = mixer_of({"card": "gdn", "preconditioner": choice, "forgetting": {"name": "token"}}), mixer_of("gdn")
    same_parameters(left, right)
    assert_same_layer(left, right)


@pytest.mark.parametrize("card", ["pgdn", "osdn_apf"])
def test_the_constant_control_is_a_longer_step(card: str) -> None:
    """Half the step through the control is half the step through the range of beta."""
    left = mixer_of({"card": card, "preconditioner": {"control": "constant", "constant": 0.5}})
    right = mixer_of({"card": card, "preconditioner": "none", "step_size": {"name": "sigmoid", "range": [0, 0.5]}})
    same_parameters(left, right)
    assert_same_layer(left, right)


@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_a_control_is_another_recurrence(name: str) -> None:
    """Each control, and each side, gives outputs of its own: none of them silently falls back to another."""
    outputs = []
    for side, control in itertools.product(("write", "query", "both"), ("none", "mean", "shuffle", "constant")):
        mixer = mixer_of(
            {
                "card": "gdn",
                "preconditioner": {"name": name, "side": side, "control": control, "constant": 0.7},
                "forgetting": "token",
            },
            output_norm=False,
        )
        torch.manual_seed(1)
        outputs.append(mixer(tokens()))
    for one, other in itertools.combinations(outputs, 2):
        assert not torch.allclose(one, other, rtol=1e-4, atol=1e-5)
