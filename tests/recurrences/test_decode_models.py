"""Models whose layers are one compiled call a token, against the same models reading in float64, and what a user may change in
them. (The layers by themselves: test_decode_compiled.py.)
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

from deltalab import registry
from deltalab.errors import UserError
from deltalab.kernels import decode
from deltalab.recurrences import LanguageModel
from deltalab.recurrences.layers import RMSNorm

from .support import F64, close, every_recurrence, stirred


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


@every_recurrence
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


@pytest.mark.parametrize(("card", "other"), [("gdn", "pgdn"), ("pgdn", "gdn"), ("pgdn", "rls")])
@pytest.mark.parametrize("gradients", [False, True])
def test_the_state_of_another_card_is_named(card: str, other: str, gradients: bool) -> None:
    """Its memory and its convolution's inputs would fit."""
    lm, wrong = model(card), model(other)
    with torch.set_grad_enabled(gradients), pytest.raises(UserError, match=r"^state\.statistic: .* this layer's preconditioner"):
        lm(torch.randint(11, (2, 1)), state=wrong.initial_state(2))


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
