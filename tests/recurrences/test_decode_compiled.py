"""Layers and models whose token is one compiled call, against the same layers reading by the definition, in float64.

The loops are compiled once for all sizes, seconds for a dtype: small tensors, many cases. (The equations of a token:
tests/kernels/test_decode_kernel.py.)
"""

from __future__ import annotations

import copy
import io
import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltalab import Mixer, registry
from deltalab.kernels import decode
from deltalab.recurrences import LanguageModel
from deltalab.recurrences.gates import ScalarGate
from deltalab.recurrences.layers import RMSNorm

F64 = torch.float64
RECURRENCES = [name for name in registry.names() if name not in ("softmax", "sliding_window")]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def stirred(module: Any) -> Any:
    """`module` in float64, with parameters that are no round numbers: what starts at 0 or 1 would hide a mistake."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return module


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


@pytest.mark.parametrize("card", RECURRENCES)
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


def model(card: Any = "pgdn", **options: Any) -> Any:
    return stirred(LanguageModel(registry.load(card), vocab=11, width=32, layers=2, heads=2, seed=0, **options))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of every compiled token since: of how many layers with the blocks around them it was; 0: of a layer alone."""
    found: list[int] = []
    token = decode.Token.__call__

    def counted(self: decode.Token, *given: Any) -> Any:
        found.append(sum(part.around is not None for part in self.parts))
        return token(self, *given)

    monkeypatch.setattr(decode.Token, "__call__", counted)
    return found


@pytest.mark.parametrize("card", RECURRENCES)
@pytest.mark.parametrize("mlp_ratio", [0.0, 1.7])
def test_a_model_decodes_as_it_reads(card: str, mlp_ratio: float, calls: list[int]) -> None:
    lm = model(card, mlp_ratio=mlp_ratio)
    for batch in (1, 3, decode.FEW + 1):
        text = torch.randint(11, (batch, 6))
        with torch.no_grad():
            whole = lm(text)
            state, outputs = lm.initial_state(batch), []
            calls.clear()
            for piece in text.split((3, 1, 1, 1), dim=1):
                before = [tensor.clone() for layer in state for tensor in layer.tensors()]
                logits, after = lm(piece, state=state)
                same = zip(before, (tensor for layer in state for tensor in layer.tensors()), strict=True)
                assert all(torch.equal(one, other) for one, other in same)
                outputs.append(logits)
                state = after
        torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=1e-10, atol=1e-10)
        assert calls == ([2] * 3 if batch <= decode.FEW else [0] * 6)


def test_a_hybrids_blocks(calls: list[int]) -> None:
    """What one block leaves to be added, where it goes the general way, is added by the next."""
    general: Any = {"card": "rls", "preconditioner": {"name": "exact", "control": "mean"}}
    lm = stirred(
        LanguageModel([registry.load(c) for c in ("softmax", "gdn", general)], vocab=11, width=32, layers=6, heads=2, seed=0)
    )
    text = torch.randint(11, (2, 5))
    with torch.no_grad():
        whole, state, outputs = lm(text), lm.initial_state(2), []
        for piece in text.split(1, dim=1):
            logits, state = lm(piece, state=state)
            outputs.append(logits)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=1e-10, atol=1e-10)
    assert calls == [1] * 10


def test_blocks_between_others_are_one_call(calls: list[int]) -> None:
    """Whatever their laws, their substeps and what they carry; `softmax` on either side, or the end of the model."""
    cards = ("softmax", "gdn", "deltaproduct", "osdn", "mamba2", "softmax", "pkda", "rls")
    lm = stirred(LanguageModel([registry.load(c) for c in cards], vocab=11, width=32, layers=8, heads=2, seed=0, mlp_ratio=1.2))
    text = torch.randint(11, (3, 6))
    with torch.no_grad():
        whole = lm(text)
        _, state = lm(text[:, :2], state=lm.initial_state(3))
        outputs = []
        for t in range(2, 6):
            logits, state = lm(text[:, t : t + 1], state=state)
            outputs.append(logits)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole[:, 2:], rtol=1e-10, atol=1e-10)
    assert calls == [4, 2] * 4


def test_a_state_that_the_call_does_not_take_goes_the_general_way(calls: list[int]) -> None:
    """One of another dtype, one that nothing has been written to, one of another batch: as the same model says with gradients."""
    lm, tokens = model(), torch.randint(11, (2, 1))
    with torch.no_grad():
        _, state = lm(tokens, state=lm.initial_state(2))
        calls.clear()
        for other in (state[1].map(torch.Tensor.float), type(state[1])(conv=state[1].conv)):
            found, _ = lm(tokens, state=[state[0], other])
            with torch.enable_grad():
                expected, _ = lm(tokens, state=[state[0], other])
            close(found, expected.detach())
            assert 2 not in calls
        with pytest.raises((RuntimeError, ValueError)):
            lm(tokens, state=lm.initial_state(3))


class Doubled(RMSNorm):
    def of_sum(self, x: Tensor, more: Tensor | None) -> tuple[Tensor, Tensor]:
        x, normalised = super().of_sum(x, more)
        return x, 2 * normalised


def _norm(kind: type[RMSNorm], eps: float) -> RMSNorm:
    norm = kind(32, eps).double()
    nn.init.normal_(norm.weight, 1.0)
    return norm


@pytest.mark.parametrize("norm", [lambda: _norm(RMSNorm, 0.5), lambda: _norm(Doubled, 1e-5)], ids=["within", "after"])
def test_the_models_norm_is_that_of_now(norm: Any, calls: list[int]) -> None:
    """Within the blocks' call; after it where it is of another class, or watched."""
    lm, tokens = model(), torch.randint(11, (2, 1))
    with torch.no_grad():
        _, state = lm(tokens, state=lm.initial_state(2))
        lm.norm = norm()
        found = [lm(tokens, state=state)[0]]
        lm.norm.register_forward_hook(lambda module, given, y: y)
        found.append(lm(tokens, state=state)[0])
    assert calls == [2] * 3
    expected, _ = lm(tokens, state=state)
    for one in found:
        close(one, expected.detach())


def test_the_weights_are_those_of_now(calls: list[int]) -> None:
    """Changed in place, loaded, of another dtype, put elsewhere: the next token is that of the new weights."""
    lm = model(mlp_ratio=1.0)
    tokens = torch.randint(11, (2, 1))

    def same() -> None:
        state = [layer.map(lambda tensor: tensor.to(lm.norm.weight.dtype)) for layer in before]
        expected, _ = lm(tokens, state=state)
        calls.clear()
        with torch.no_grad():
            found, _ = lm(tokens, state=state)
            assert calls == [2]
        error = (found - expected.detach()).norm() / expected.norm()
        assert error < (1e-12 if found.dtype == F64 else 1e-5)
        seen.append(found.double())

    seen: list[Tensor] = []
    with torch.no_grad():
        _, before = lm(torch.randint(11, (2, 4)), state=lm.initial_state(2))
    same()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter *= 1.1
    same()
    other = model(mlp_ratio=1.0)
    lm.load_state_dict(other.state_dict())
    same()
    lm.load_state_dict({name: 1.2 * value for name, value in other.state_dict().items()}, assign=True)
    same()
    lm.float()
    same()
    lm.double()
    same()
    mixer = lm.blocks[0].mixer
    mixer.in_proj.weight.data = 2 * mixer.in_proj.weight.data
    same()
    mixer.in_proj.weight.data = mixer.in_proj.weight.data.T.contiguous().T
    same()
    mixer.out_proj.weight.data = mixer.out_proj.weight.data.T  # a square: the numbers stay where they are
    same()
    mixer.gate.A_log = nn.Parameter(mixer.gate.A_log.detach() + 1)
    same()
    lm.blocks[1].mlp.down = type(lm.blocks[1].mlp.down)(32, 32).double()
    nn.init.normal_(lm.blocks[1].mlp.down.weight)
    same()
    changed = [not torch.allclose(one, other, rtol=1e-3) for one, other in itertools.pairwise(seen)]
    assert changed == [True, True, True, False, False, True, False, True, True, True]


@pytest.mark.parametrize("card", ["retnet", {"card": "osgdn", "forgetting": {"name": "constant", "gamma": 0.9}}], ids=str)
def test_fixed_numbers_have_the_precision_of_now(card: Any, calls: list[int]) -> None:
    lm, tokens = model(card).float(), torch.randint(11, (2, 1))
    with torch.no_grad():
        lm(tokens, state=lm.initial_state(2))
        lm.double()
        _, state = lm(torch.randint(11, (2, 3)), state=lm.initial_state(2))
        found, after = lm(tokens, state=state)
    assert calls == [2] * 2
    expected, before = lm(tokens, state=state)
    close(found, expected.detach())
    close(after[0].memory, before[0].memory.detach())


def test_threads_may_share_a_model(calls: list[int]) -> None:
    """Each carries a text of its own, and a token is found to be compiled anew while others are at work."""
    texts = torch.randint(11, (4, 1, 12))
    lm = model(mlp_ratio=1.0)
    with torch.no_grad():
        expected = [lm(text) for text in texts]
    lm = copy.deepcopy(lm)

    def read(text: Tensor) -> Tensor:
        with torch.no_grad():
            state, outputs = lm.initial_state(1), []
            for t in range(text.shape[1]):
                if t % 4 == 0:
                    lm.blocks[0].mixer.in_proj.weight = nn.Parameter(lm.blocks[0].mixer.in_proj.weight.detach())
                logits, state = lm(text[:, t : t + 1], state=state)
                outputs.append(logits)
        return torch.cat(outputs, dim=1)

    with ThreadPoolExecutor(4) as pool:
        for found, whole in zip(pool.map(read, texts), expected, strict=True):
            torch.testing.assert_close(found, whole, rtol=1e-10, atol=1e-10)
    assert set(calls) == {2}


def test_copies_have_weights_of_their_own(calls: list[int]) -> None:
    lm, tokens = model(), torch.randint(11, (1, 1))
    with torch.no_grad():
        first, _ = lm(tokens, state=lm.initial_state(1))
        file = io.BytesIO()
        torch.save(lm, file)
        file.seek(0)
        copies = [copy.deepcopy(lm), torch.load(file, weights_only=False)]
        for parameter in lm.parameters():
            parameter.zero_()
        for other in copies:
            close(other(tokens, state=other.initial_state(1))[0], first)
    assert calls == [2] * 3


def test_with_gradients_the_ordinary_way(calls: list[int]) -> None:
    lm = model()
    logits, _ = lm(torch.randint(11, (2, 1)), state=lm.initial_state(2))
    logits.sum().backward()
    assert not calls and all(parameter.grad is not None for parameter in lm.blocks[0].mixer.in_proj.parameters())


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


def _hook(part: nn.Module) -> Any:
    return part.register_forward_hook(lambda module, given, y: y * 2)


def _other_norm(block: Any) -> None:
    norm = type(block.mlp_norm)(32, eps=1.0).double()
    norm.load_state_dict(block.mlp_norm.state_dict())
    block.mlp_norm = norm


CHANGES: dict[str, Any] = {
    "norm": lambda block: _hook(block.mixer_norm),
    "mlp": lambda block: _hook(block.mlp),
    "down": lambda block: _hook(block.mlp.down),
    "in_proj": lambda block: _hook(block.mixer.in_proj),
    "out_proj": lambda block: _hook(block.mixer.out_proj),
    "gate_proj": lambda block: _hook(block.mixer.gate.proj),
    "block": lambda block: block.register_forward_hook(lambda module, given, y: (y[0] * 2, *y[1:])),
    "mixer": lambda block: block.mixer.register_forward_hook(lambda module, given, y: (y[0] * 2, y[1])),
    "before": lambda block: block.mixer_norm.register_forward_pre_hook(lambda module, given: (given[0] * 2,)),
    "method": lambda block: setattr(block.mlp, "forward", lambda x, old=block.mlp.forward: 2 * old(x)),
    "adapter": lambda block: setattr(block.mlp, "down", nn.Sequential(block.mlp.down, nn.Tanh())),
    "eps": _other_norm,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_user_changes_in_a_block_counts(change: str, calls: list[int]) -> None:
    """After tokens have been decoded: the others' answers are heard, and those of the layer that is as before are compiled."""
    lm, tokens = model(mlp_ratio=1.0), torch.randint(11, (2, 1))
    with torch.no_grad():
        plain, state = lm(tokens, state=lm.initial_state(2))
        plain, _ = lm(tokens, state=state)
        CHANGES[change](lm.blocks[0])
        calls.clear()
        found, _ = lm(tokens, state=state)
        assert calls[-1] == 1 and calls[:-1] in ([], [0])
    expected, _ = lm(tokens, state=state)
    close(found, expected.detach())
    assert not torch.allclose(found, plain)


def test_an_observer_sees_every_token() -> None:
    lm, seen = model(), []
    with torch.no_grad():
        _, state = lm(torch.randint(11, (2, 1)), state=lm.initial_state(2))
        lm.mixers()[0].observer = seen.append
        lm(torch.randint(11, (2, 1)), state=state)
    assert len(seen) == 1


@pytest.mark.parametrize("card", RECURRENCES)
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
