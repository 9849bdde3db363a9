"""Layers of several substeps a token, and of preconditioners that carry a matrix, whose token is one compiled call: against the
same layers reading by the definition, in float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deltalab import Mixer, registry

from .test_decode_compiled import F64, assert_decodes, close, compiled, stirred

RAW = {"qk": {"normalise_k": "none"}}
SUBSTEPS: dict[str, Any] = {
    "three": {"card": "gated_deltaproduct", "substeps": 3},
    "eight": {"card": "deltaproduct", "substeps": 8},
    "gates per channel": {"card": "kda", "substeps": 2},
    "steps with a bias": {"card": "kla", "substeps": 2},
    "steps without parameters": {"card": "mamba2", "substeps": 2},
    "constant steps": {"card": "gdn", "substeps": 2, "step_size": {"name": "constant", "beta": 0.7}},
    "steps that gate": {"card": "longhorn", "substeps": 3},
    "exact flows": {"card": "efla", "substeps": 2, **RAW},
    "a read key that is fed back": {"card": "comba", "substeps": 2},
    "erases and values per channel": {"card": "gdn2", "substeps": 2},
    "values by the key's length": {"card": "gdn", "substeps": 2, "value_gain": "inverse_norm"},
    "diagonals": {"card": "pgdn", "substeps": 2, "preconditioner": {"name": "diagonal", "side": "both"}},
    "hypergradients": {"card": "osgdn", "substeps": 3},
    "least squares": {"card": "rls", "substeps": 2, "forgetting": {"name": "constant", "gamma": 0.9}},
    "conjugate gradients": {"card": "mesanet", "substeps": 2, "forgetting": "gated"},
}
LIMITED = {"name": "exact", "limit": 20.0}  # beyond, P's rounding is too large for the tolerance
MATRICES: dict[str, Any] = {
    "forgets": {"card": "rls", "forgetting": "gated", "preconditioner": LIMITED},
    "forgets as the state": {"card": "rls", "gate": "scalar", "forgetting": "tied", "preconditioner": LIMITED},
    "forgets what it may": {"card": "rls", "forgetting": {"name": "constant", "gamma": 0.3}, "preconditioner": LIMITED},
    "weighs keys": {"card": "rls", "step_size": "sigmoid"},
    "long keys": {"card": "mesanet", **RAW},
    "never forgets": {"card": "mesanet", "gate": "none", "forgetting": "none"},
    "its query is fed back": {"card": "mesanet", "feedback": "read_key"},
}


@pytest.mark.parametrize("option", [*SUBSTEPS, *MATRICES])
@pytest.mark.parametrize("block", [{}, {"key_heads": 1, "short_conv": 1, "expand_v": 1.5, "skip": True, "output_norm": False}])
def test_options(option: str, block: dict[str, Any]) -> None:
    mixer = stirred(Mixer(registry.load({**SUBSTEPS, **MATRICES}[option]), width=32, heads=2, seed=1, **block))
    assert mixer.compiled() is not None
    for batch in (1, 3):
        assert_decodes(mixer, batch)


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_as_many_conjugate_gradients_as_are_asked_for(iterations: int) -> None:
    """So few that the solution is not there yet: the token stops where the chunk form does."""
    card = {"card": "mesanet", "preconditioner": {"name": "exact", "side": "query", "iterations": iterations}, **RAW}
    mixer, x = stirred(Mixer(registry.load(card), width=32, heads=2, seed=1, output_norm=False)), torch.randn(2, 9, 32, dtype=F64)
    with torch.no_grad():
        _, state = mixer(4 * x[:, :8], state=mixer.initial_state(2))
        found, after = mixer(x[:, 8:], state=state)
    expected, before = mixer(x[:, 8:], state=state)
    close(found, expected.detach())
    close(after.statistic, before.statistic.detach())
    mixer.backend = "reference"
    exact, _ = mixer(x[:, 8:], state=state)
    assert (found - exact.detach()).norm() > 1e-6 * exact.norm()


def test_a_query_of_zeros_reads_zero() -> None:
    mixer = Mixer(registry.load("mesanet"), width=32, heads=2, seed=0, short_conv=0).double()
    x = torch.randn(1, 1, 32, dtype=F64)
    with torch.no_grad():
        mixer.in_proj.weight[:32] = 0
        y, state = mixer(x, state=mixer.initial_state(1))
        y, state = mixer(x, state=state)
    assert mixer.compiled() is not None
    assert torch.equal(y, torch.zeros_like(y))
    assert torch.equal(state.statistic, state.statistic.mT)


@pytest.mark.parametrize("card", [{"card": "rls", "forgetting": {"name": "constant", "gamma": 0.98}}, "mesanet"], ids=str)
def test_matrices_stay_symmetric_in_float32(card: Any) -> None:
    """To the last bit, over many tokens: what rounding added would grow as 1 / gamma a token."""
    mixer = Mixer(registry.load(card), width=32, heads=2, seed=0)
    with torch.no_grad():
        _, state = mixer(torch.randn(2, 3, 32), state=mixer.initial_state(2))
        for _ in range(300):
            y, state = mixer(torch.randn(2, 1, 32), state=state)
        assert mixer.compiled() is not None
        assert torch.equal(state.statistic, state.statistic.mT)
        assert torch.linalg.eigvalsh(state.statistic.double()).min() > -1e-6
        x = torch.randn(2, 1, 32)
        y, _ = mixer(x, state=state)
        wide = mixer.double()
        exact, _ = wide(x.double(), state=state.map(torch.Tensor.double))
    assert (y - exact).norm() < 1e-4 * exact.norm()


def test_every_substep_has_its_own_parts() -> None:
    """A hook on one, another class, other options: heard with and without gradients."""
    mixer = Mixer(registry.load({"card": "deltaproduct", "substeps": 3}), width=32, heads=2, seed=0).double()
    x = torch.randn(2, 1, 32, dtype=F64)

    def same() -> torch.Tensor:
        expected, _ = mixer(x, state=state)
        with torch.no_grad():
            found, _ = mixer(x, state=state)
        close(found, expected.detach())
        return found

    with torch.no_grad():
        _, state = mixer(torch.randn(2, 3, 32, dtype=F64), state=mixer.initial_state(2))
    first = same()
    handle = mixer.later_steps[1].proj.register_forward_hook(lambda module, given, z: z + 1)
    assert not torch.allclose(same(), first)
    handle.remove()
    handle = mixer.later_steps[0].register_forward_hook(lambda module, given, step: step._replace(beta=step.beta / 2))
    assert mixer.compiled() is None
    assert not torch.allclose(same(), first)
    handle.remove()
    close(same(), first)
    other = Mixer(registry.load({"card": "deltaproduct", "step_size": "sigmoid"}), width=32, heads=2, seed=1).double()
    mixer.later_steps[0] = other.step_size
    assert mixer.compiled() is None
    assert not torch.allclose(same(), first)


def test_what_goes_the_general_way() -> None:
    assert compiled({"card": "osdn", "substeps": 2})
    assert not compiled({"card": "gdn", "substeps": 2, "step_size": "inverse_time"})
    assert not compiled({"card": "mesanet", "preconditioner": {"name": "exact", "side": "query", "control": "shuffle"}})
    with torch.no_grad():  # a token by the recurrence's own path, of one substep or several
        for substeps in (1, 2):
            card = {"card": "rls", "substeps": substeps, "preconditioner": {"name": "exact", "control": "mean"}}
            assert_decodes(stirred(Mixer(registry.load(card), width=32, heads=2, seed=1)), 2)
