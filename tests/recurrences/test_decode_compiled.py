"""Layers whose token is one compiled call, against the same layers reading by the definition, in float64.

The loops are compiled once for all sizes, seconds for a dtype: small tensors, many cases. (The equations of a token:
tests/kernels/test_decode_kernel.py; models: test_decode_models.py.)
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltalab import Mixer, registry
from deltalab.kernels import decode
from deltalab.recurrences.gates import ScalarGate

from .support import F64, close, every_recurrence, stirred


def compiled(card: Any, **block: Any) -> bool:
    return Mixer(registry.load(card), width=32, heads=2, **block).compiled() is not None


def assert_decodes(mixer: Any, batch: int, inference: bool = False) -> None:
    """Token by token without gradients, after a prompt, is one pass of the definition; no state is changed by its use."""
    x = torch.randn(batch, 8, 32, dtype=F64)
    with torch.no_grad(), torch.inference_mode(inference):
        mixer.backend = "reference"
        whole, final = mixer(x, state=mixer.initial_state(batch))
        y, state = mixer(x[:, :3], state=mixer.initial_state(batch))
        mixer.backend, outputs = "auto", [y]
        for t in range(3, 8):
            before = [tensor.clone() for tensor in state.tensors()]
            y, after = mixer(x[:, t : t + 1], state=state)
            assert all(torch.equal(one, other) for one, other in zip(before, state.tensors(), strict=True))
            outputs.append(y)
            state = after
    close(torch.cat(outputs, dim=1), whole)
    for one, other in zip(state.tensors(), final.tensors(), strict=True):
        close(one, other)


BLOCKS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "wide_values": {"expand_v": 2.0, "output_gate": "silu"},
    "skip": {"skip": True, "output_norm": False},
    "no_convolution": {"short_conv": 0},
    "shared_keys": {"key_heads": 1, "short_conv": 1, "output_gate": "sigmoid", "output_gate_rank": 5},
}


@every_recurrence
@pytest.mark.parametrize("block", BLOCKS)
def test_a_layer_decodes_as_it_reads(card: str, block: str) -> None:
    mixer = stirred(Mixer(registry.load(card), width=32, heads=2, seed=1, **BLOCKS[block]))
    assert mixer.compiled() is not None
    for batch in (1, 3, decode.FEW + 1):
        assert_decodes(mixer, batch, inference=batch == 1)


OPTIONS: dict[str, Any] = {
    "constant step": {"card": "gdn", "step_size": {"name": "constant", "beta": 0.7}},
    "exact proximal step": {"card": "kla", "step_size": {"name": "longhorn", "own_gate": False}},
    "relaxed kaczmarz": {"card": "kla", "step_size": {"name": "kaczmarz", "range": [0.0, 2.0], "eps": 0.1}},
    "efla of a gate": {"card": "gdn", "step_size": "efla", "qk": {"normalise_k": "none"}},
    "efla of a preconditioner": {"card": "pgdn", "step_size": "efla", "qk": {"normalise_k": "none"}},
    "bounded channels": {"card": "kda", "gate": {"name": "channel", "lower_bound": -5.0}},
    "gain of a head": {"card": "gdn", "value_gain": "learned"},
    "inverse norm": {"card": "gdn", "value_gain": "inverse_norm"},
    "tied forgetting": {"card": "pgdn", "forgetting": "tied"},
    "learned forgetting": {"card": "pgdn", "forgetting": {"name": "learned", "bias": 2.0}},
    "constant forgetting": {"card": "osgdn", "forgetting": {"name": "constant", "gamma": 0.9}},
    "both sides": {"card": "pgdn", "preconditioner": {"name": "diagonal", "side": "both"}},
    "feedback without erase": {"card": "gla", "feedback": "read_key"},
    "elu of a delta rule": {"card": "gdn", "qk": {"activation": "elu1"}},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("plain_values", [False, True])
def test_options_of_components(option: str, plain_values: bool) -> None:
    block: dict[str, Any] = {"value_activation": "none", "expand_v": 1.5} if plain_values else {}
    mixer = stirred(Mixer(registry.load(OPTIONS[option]), width=32, heads=2, seed=1, **block))
    assert mixer.compiled() is not None
    assert_decodes(mixer, 2)


def test_a_planted_fault_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = decode._numbers
    monkeypatch.setattr(decode, "_numbers", lambda dtype, first, *others: numbers(dtype, first * (1 + 1e-9), *others))
    with pytest.raises(AssertionError):
        test_a_layer_decodes_as_it_reads("retnet", "skip")  # without a norm, which would hide it


def test_options_and_components_that_the_token_does_not_know() -> None:
    """They go the general way: another class may have another law, whatever it derives from."""
    assert compiled("pgdn")
    changes = {"control": "mean", "squash": "tanh", "normalise": "regularised", "current": False, "interval": "below"}
    for change in ({name: value} for name, value in changes.items()):
        assert not compiled({"card": "pgdn", "preconditioner": {"name": "diagonal", **change}})
    assert not compiled({"card": "pgdn", "forgetting": {"name": "gated", "anchor": "one"}})
    assert not compiled({"card": "gdn", "qk": {"activation": "softmax"}})
    assert not compiled({"card": "gdn", "step_size": "inverse_time"})
    assert not compiled({"card": "osdn", "substeps": 2, "preconditioner": {"name": "hypergradient", "clip": "chunk"}})
    for change in ({"control": "mean"}, {"side": "both"}):
        assert not compiled({"card": "rls", "preconditioner": {"name": "exact", **change}})


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
    mixer.gate.proj = nn.Sequential(mixer.gate.proj, nn.Tanh())
    same(mixer)
    handle = mixer.step_size.proj.register_forward_hook(lambda module, given, z: z + 1)
    same(mixer)
    handle.remove()
    handle = mixer.step_size.register_forward_hook(lambda module, given, step: step._replace(beta=step.beta / 2))
    assert mixer.compiled() is None
    same(mixer)
    handle.remove()
    same(copy.deepcopy(mixer))


@every_recurrence
def test_float32_half_precision_and_threads(card: str) -> None:
    """float32 as near to float64 as the definition is; a bfloat16 model takes the general way; the same bits from any number of
    threads, and in any company."""
    mixer = Mixer(registry.load(card), width=256, heads=4, seed=0)
    x, threads = torch.randn(8, 3, 256), torch.get_num_threads()
    with torch.no_grad():
        wide = Mixer(registry.load(card), width=256, heads=4, backend="reference", seed=0).double()
        exact, final = wide(x.double(), state=wide.initial_state(8))
        results = []
        try:
            for number, batch in ((1, 8), (2, 8), (1, 3)):
                torch.set_num_threads(number)
                state, outputs = mixer.initial_state(batch), []
                for t in range(3):
                    y, state = mixer(x[:batch, t : t + 1], state=state)
                    outputs.append(y)
                results.append([torch.cat(outputs, dim=1), *state.tensors()])
        finally:
            torch.set_num_threads(threads)
        assert (results[0][0] - exact).norm() < 2e-6 * exact.norm()
        assert (results[0][2] - final.memory).norm() < 2e-6 * final.memory.norm()
        assert all(torch.equal(one, other) for one, other in zip(*results[:2], strict=True))
        assert all(torch.equal(one[:3], other) for one, other in zip(results[0], results[2], strict=True))
        half = mixer.bfloat16()
        y, state = half(x[:, :1].bfloat16(), state=half.initial_state(8))
    assert (y.dtype, state.memory.dtype) == (torch.bfloat16, torch.float32)
