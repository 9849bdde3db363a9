"""Decoding: a real state object, exact in its bytes, that continues a sequence wherever it was cut; saved, loaded, used twice."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from deltalab import Mixer, registry
from deltalab.recurrences import AttentionSpec, MixerState

from .support import STREAMING, assert_same_state, cut, every_card, every_recurrence, mixer_of, model_of, prefilled, tokens

BLOCKS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no_convolution": {"short_conv": 0},
    "wide_values": {"expand_v": 2.0, "output_gate": "silu"},
    "own_head_width": {"head_width": 5, "output_gate": "sigmoid", "output_norm": False},
    "skip": {"skip": True, "short_conv": 2},
}
CHUNK = 64  # of the kernels


def of_card(card: str) -> Any:
    """The card; sliding windows so short that they slide."""
    return {"card": card, "window": 5} if card == "sliding_window" else card


@every_card
@pytest.mark.parametrize("block", BLOCKS)
def test_streaming_is_one_pass(card: str, block: str) -> None:
    mixer, x = mixer_of(of_card(card), **BLOCKS[block]), tokens()
    whole = mixer(x)
    again, final = mixer(x, state=mixer.initial_state(2))
    torch.testing.assert_close(again, whole, rtol=1e-12, atol=1e-12)
    for prefill in (0, 1, 4, 8, 9):
        y, state = cut(mixer, x, prefilled(prefill, 9))
        torch.testing.assert_close(y, whole, rtol=1e-10, atol=1e-10)
        assert_same_state(state, final)


@every_card
@pytest.mark.parametrize(
    "sizes",
    [[CHUNK, 70], [CHUNK - 1, 1, 70], [CHUNK + 1, 69], [130, 4], [1, 1, 132], [33] * 4 + [2], [128, *[1] * 6], [2, CHUNK, 68]],
    ids=str,
)
def test_streaming_across_chunks(card: str, sizes: list[int]) -> None:
    """134 tokens are more than two chunks of the kernel; the calls end at, before and after its ends."""
    mixer, x = mixer_of(of_card(card), width=4, heads=1), tokens(4, sum(sizes), 1)
    whole, final = mixer(x, state=mixer.initial_state(1))
    y, state = cut(mixer, x, sizes)
    torch.testing.assert_close(y, whole, **STREAMING)
    assert_same_state(state, final)


@every_card
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_an_empty_call_changes_nothing(card: str, backend: str) -> None:
    mixer, x = mixer_of(of_card(card)), tokens()
    mixer.backend = backend
    _, state = mixer(x, state=mixer.initial_state(2))
    y, same = mixer(x[:, :0], state=state)
    assert y.shape == (2, 0, 12)
    assert_same_state(same, state, rtol=1e-12, atol=1e-12)
    assert mixer(x[:, :0]).shape == (2, 0, 12)


@every_card
def test_the_language_model_decodes_as_it_reads(card: str) -> None:
    model = model_of(of_card(card), mlp_ratio=1.0, backend="reference").double()
    text = torch.randint(11, (2, 7))
    whole = model(text)
    state, outputs = model.initial_state(2), []
    for piece in text.split((3, 1, 1, 2), dim=1):
        logits, state = model(piece, state=state)
        outputs.append(logits)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=1e-10, atol=1e-10)
    assert model.state_bytes(7) == sum(one.state_bytes for one in state) // 2


def stored(state: MixerState) -> int:
    """Bytes that copies of the state's tensors take: views and broadcasts count in full."""
    copies = (tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in state.tensors())
    return sum(copied.untyped_storage().nbytes() for copied in copies)


@every_card
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("block", BLOCKS)
def test_state_bytes_are_those_of_the_state(card: str, dtype: torch.dtype, block: str) -> None:
    mixer = Mixer(registry.load(of_card(card)), width=12, heads=2, seed=0, **BLOCKS[block]).to(dtype)
    state = mixer.initial_state(3)
    assert state.state_bytes == 3 * mixer.state_bytes(0) == stored(state)
    for length in (1, 4, 6):
        _, state = mixer(torch.randn(3, length, 12, dtype=dtype), state=mixer.initial_state(3))
        assert state.state_bytes == 3 * mixer.state_bytes(length) == stored(state)
    assert all(tensor.shape[0] == 3 for tensor in state.tensors())


EXTRA = {  # bytes of one sequence beside conv and memory, 2 heads x K = 6: statistics in float32
    **dict.fromkeys(("pdn", "pgdn", "pkda", "pla", "osdn", "osdn_apf", "osdn_bounded", "osgdn", "oskda"), 2 * 6 * 4),
    **dict.fromkeys(("rls", "mesanet"), 2 * 6 * 6 * 4),
}


@every_recurrence
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_bytes_in_numbers(card: str, dtype: torch.dtype) -> None:
    """conv: 3 inputs of all channels in the parameters' dtype; memory and statistic: float32, whatever the parameters are."""
    mixer = Mixer(registry.load(card), width=12, heads=2).to(dtype)
    channels = 12 * (1 + 2 * mixer.spec.substeps)
    assert mixer.state_bytes(1000) == dtype.itemsize * 3 * channels + 4 * 2 * 6 * 6 + EXTRA.get(card, 0)


@every_card
def test_the_state_has_the_promised_shapes(card: str) -> None:
    mixer = Mixer(registry.load(card), width=12, heads=3, expand_v=2.0)
    _, state = mixer(torch.randn(2, 5, 12), state=mixer.initial_state(2))
    if isinstance(registry.load(card), AttentionSpec):
        assert (state.keys.shape, state.values.shape) == ((2, 3, 5, 4), (2, 3, 5, 8))
        return
    assert state.memory.shape == (2, 3, 4, 8)
    assert state.memory.dtype == torch.float32
    shapes = {0: None, 2 * 6 * 4: (2, 3, 4), 2 * 6 * 6 * 4: (2, 3, 4, 4)}
    expected = shapes[EXTRA.get(card, 0)]
    assert (state.statistic is None) == (expected is None)
    if state.statistic is not None:
        assert state.statistic.shape == expected
        assert state.statistic.dtype == torch.float32


@every_card
@pytest.mark.parametrize("autocast", [False, True])
def test_the_state_of_a_half_precision_model_is_wide(card: str, autocast: bool) -> None:
    """A bfloat16 step near 1 is as large as all of a hypergradient's movement."""
    mixer = Mixer(registry.load(of_card(card)), width=12, heads=2, seed=0)
    x = torch.randn(2, 5, 12)
    if not autocast:
        mixer, x = mixer.bfloat16(), x.bfloat16()
    state = mixer.initial_state(2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for piece in x.split((3, 1, 1), dim=1):
            y, state = mixer(piece, state=state)
    assert y.dtype == torch.bfloat16
    assert torch.isfinite(y).all()
    for tensor in (state.memory, state.statistic):
        assert tensor is None or tensor.dtype == torch.float32
    assert autocast or state.state_bytes == 2 * mixer.state_bytes(5)


@every_card
def test_a_half_precision_model_streams_as_it_reads(card: str) -> None:
    """The state loses nothing that one pass keeps: equal up to the rounding of the projections themselves."""
    mixer = Mixer(registry.load(of_card(card)), width=12, heads=2, seed=0).bfloat16()
    x = torch.randn(1, 20, 12).bfloat16()
    with torch.no_grad():
        y, _ = cut(mixer, x, prefilled(7, 20))
        whole = mixer(x)
    assert (y - whole).abs().max() <= 2**-6 * whole.abs().max()


@every_card
def test_a_saved_state_continues_the_sequence(card: str) -> None:
    """`torch.load` reads it as it is, with its own guard against foreign code (weights_only) on."""
    mixer, x = mixer_of(of_card(card)), tokens(length=8)
    with torch.no_grad():
        whole = mixer(x)
        for at in (0, 5):  # the initial state can be saved too
            _, state = cut(mixer, x[:, :at], [at]) if at else (None, mixer.initial_state(2))
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            for restored in (torch.load(file, weights_only=True), copy.deepcopy(state)):
                assert isinstance(restored, MixerState)
                y, _ = mixer(x[:, at:], state=restored)
                torch.testing.assert_close(y, whole[:, at:], rtol=1e-12, atol=1e-12)


def test_a_language_models_state_is_loaded_in_another_process(tmp_path: Path) -> None:
    model = model_of("osdn rls sliding_window", layers=3)
    with torch.no_grad():
        _, state = model(torch.arange(5)[None], state=model.initial_state(1))
    torch.save(state, tmp_path / "state.pt")
    code = (
        "import sys, torch, deltalab.recurrences\n"
        "print(*(layer.state_bytes for layer in torch.load(sys.argv[1], weights_only=True)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "state.pt")]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()
    assert [int(word) for word in found] == [layer.state_bytes for layer in state]


@every_card
def test_a_state_is_not_changed_by_its_use(card: str) -> None:
    """One prompt can be continued in several ways."""
    mixer, x = mixer_of(of_card(card)), tokens(length=6)
    with torch.no_grad():
        _, state = mixer(x[:, :4], state=mixer.initial_state(2))
        before = [tensor.clone() for tensor in state.tensors()]
        first, _ = mixer(x[:, 4:], state=state)
        second, _ = mixer(x[:, 4:], state=state)
    assert torch.equal(first, second)
    assert all(torch.equal(one, other) for one, other in zip(before, state.tensors(), strict=True))


@every_card
def test_sequences_of_a_batch_may_stand_at_different_places(card: str) -> None:
    """States of two prompts of unequal length, joined into a batch: each goes on as it would alone. Not for full attention,
    whose caches then differ in length."""
    if card == "softmax":
        with pytest.raises(RuntimeError, match="must match"):
            _join(card, tokens(length=8, batch=1), (3, 6))
        return
    mixer, joined, x = _join(card, tokens(length=8, batch=1), (5, 7))
    y, _ = mixer(x[:, 7:].expand(2, -1, -1), state=joined)
    for row, at in enumerate((5, 7)):
        _, state = cut(mixer, x[:, :at], [at])
        alone, _ = mixer(x[:, 7:], state=state)
        torch.testing.assert_close(y[row : row + 1], alone, rtol=1e-12, atol=1e-12)


def _join(card: str, x: torch.Tensor, lengths: tuple[int, int]) -> tuple[Any, MixerState, torch.Tensor]:
    mixer = mixer_of(of_card(card))
    states = [cut(mixer, x[:, :at], [at])[1] for at in lengths]
    fields = {
        name: None if value is None else torch.cat([value, vars(states[1])[name]]) for name, value in vars(states[0]).items()
    }
    return mixer, MixerState(**fields), x


@pytest.mark.parametrize("law", ["reciprocal", "root", "logarithm"])
def test_the_clock_of_a_decreasing_step_goes_on(law: str) -> None:
    """beta_t = f(t) sigmoid(W x_t): the factor of every token, wherever the calls are cut; 8 bytes a sequence."""
    mixer = mixer_of({"card": "deltanet", "step_size": {"name": "inverse_time", "law": law}})
    x, place = tokens(length=7), mixer.initial_state(2).position
    assert mixer.state_bytes(3) - mixer_of("deltanet").state_bytes(3) == 8
    found, before = [], place
    for piece in x.split((3, 1, 2, 1), dim=1):
        found.append(mixer.step_size(piece, torch.zeros(2, piece.shape[1], 2, 6).double(), None, before).beta)
        before = before + piece.shape[1]
    t = torch.arange(1, 8).double()
    factor = {"reciprocal": 1 / t, "root": t**-0.5, "logarithm": 1 / (1 + t).log()}[law]
    expected = factor[None, :, None] * torch.sigmoid(x @ mixer.step_size.proj.weight.T)
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-12, atol=1e-12)
    _, state = cut(mixer, x, [3, 1, 2, 1])
    assert state.position.tolist() == [7, 7]


@pytest.mark.parametrize("window", [1, 2, 5, 64, 100])
def test_a_window_keeps_what_it_will_see(window: int) -> None:
    mixer, x = mixer_of({"card": "sliding_window", "window": window}), tokens(length=80, batch=1)
    y, state = cut(mixer, x, [3, 1, 60, 1, 1, 14])
    torch.testing.assert_close(y, mixer(x), rtol=1e-10, atol=1e-10)
    assert state.keys.shape[2] == min(80, window - 1)
    assert state.state_bytes == mixer.state_bytes(80)
