"""Every shipped card as a mixer and as a language model: it trains, streams, is causal, and its state is what it says it is."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from deltalab import LanguageModel, Mixer, registry
from deltalab.errors import UserError
from deltalab.recurrences import AttentionSpec

CARDS = registry.names()
every_card = pytest.mark.parametrize("card", CARDS)
BLOCKS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no_convolution": {"short_conv": 0},
    "wide_values": {"expand_v": 2.0, "output_gate": "silu"},
    "own_head_width": {"head_width": 5, "output_gate": "sigmoid", "output_norm": False},
    "skip": {"skip": True, "short_conv": 2},
}


def model_of(card: str, **options: Any) -> LanguageModel:
    return LanguageModel(registry.load(card), vocab=11, width=12, layers=2, heads=2, seed=0, **options)


def test_the_cards_that_are_promised_are_there() -> None:
    promised = {
        "linear_attention",
        "mamba2",
        "deltanet",
        "gdn",
        "kda",
        "kla",
        "pdn",
        "pgdn",
        "pkda",
        "osdn",
        "osdn_apf",
        "softmax",
    }
    assert promised <= set(CARDS)


@every_card
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_gets_a_gradient(card: str, tied: bool) -> None:
    """No exception is needed: even OSDN's d_1 = 0, where nothing is written at first, has one."""
    model = model_of(card, mlp_ratio=2.0, tied=tied)
    tokens = torch.randint(11, (2, 9))
    loss = cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad, name
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


@every_card
def test_a_few_steps_lower_the_loss(card: str) -> None:
    model = model_of(card)
    tokens = torch.arange(18).remainder(11).expand(2, -1)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(8):
        loss = cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@every_card
@pytest.mark.parametrize("block", BLOCKS)
def test_streaming_is_one_pass(card: str, block: str, mixer_of: Callable[..., Mixer], streamed: Callable[..., Any]) -> None:
    mixer = mixer_of(card, **BLOCKS[block])
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    whole = mixer(x)
    again, final = mixer(x, state=mixer.initial_state(2))
    torch.testing.assert_close(again, whole, rtol=1e-10, atol=1e-10)
    for prefill in (0, 1, 4, 8, 9):
        y, state = streamed(mixer, x, prefill)
        torch.testing.assert_close(y, whole, rtol=1e-10, atol=1e-10)
        for one, other in zip(state.tensors(), final.tensors(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@every_card
def test_streaming_across_chunks(card: str, mixer_of: Callable[..., Mixer]) -> None:
    """70 tokens are more than a chunk of the kernel; the calls are split at, before and after its end."""
    mixer = mixer_of(card, width=4, heads=1)
    x = torch.randn(1, 70, 4, dtype=torch.float64)
    whole = mixer(x)
    for sizes in ((64, 6), (63, 1, 6), (66, 4)):
        state, outputs = mixer.initial_state(1), []
        for piece in x.split(sizes, dim=1):
            y, state = mixer(piece, state=state)
            outputs.append(y)
        torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=1e-9, atol=1e-9)


@every_card
def test_the_language_model_decodes_as_it_reads(card: str) -> None:
    model = model_of(card, mlp_ratio=1.0, backend="reference").double()
    tokens = torch.randint(11, (2, 7))
    whole = model(tokens)
    state, outputs = model.initial_state(2), []
    for piece in tokens.split((3, 1, 1, 2), dim=1):
        logits, state = model(piece, state=state)
        outputs.append(logits)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=1e-10, atol=1e-10)
    assert model.state_bytes(7) == sum(one.state_bytes for one in state) // 2


@every_card
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", BLOCKS)
def test_state_bytes_are_those_of_the_state(card: str, dtype: torch.dtype, block: str) -> None:
    mixer = Mixer(registry.load(card), width=12, heads=2, seed=0, **BLOCKS[block]).to(dtype)
    state = mixer.initial_state(3)
    assert state.state_bytes == 3 * mixer.state_bytes(0)
    for tokens in (1, 6):
        _, state = mixer(torch.randn(3, tokens, 12, dtype=dtype), state=mixer.initial_state(3))
        assert state.state_bytes == 3 * mixer.state_bytes(tokens)
    assert all(tensor.shape[0] == 3 for tensor in state.tensors())


@every_card
def test_the_memory_has_the_promised_shape_and_width(card: str) -> None:
    mixer = Mixer(registry.load(card), width=12, heads=3, expand_v=2.0)
    _, state = mixer(torch.randn(2, 5, 12), state=mixer.initial_state(2))
    if isinstance(registry.load(card), AttentionSpec):
        assert state.keys is not None
        assert state.keys.shape == (2, 3, 5, 4)
        assert state.values is not None
        assert state.values.shape == (2, 3, 5, 8)
        return
    assert state.memory is not None
    assert state.memory.shape == (2, 3, 4, 8)
    assert state.memory.dtype == torch.float32
    if state.statistic is not None:
        assert state.statistic.shape == (2, 3, 4)
        assert state.statistic.dtype == torch.float32


@every_card
def test_the_state_of_a_half_precision_model_is_wide(card: str) -> None:
    """A bfloat16 step near 1 is as large as all of a hypergradient's movement."""
    mixer = Mixer(registry.load(card), width=12, heads=2, seed=0).bfloat16()
    y, state = mixer(torch.randn(2, 5, 12, dtype=torch.bfloat16), state=mixer.initial_state(2))
    assert y.dtype == torch.bfloat16
    assert torch.isfinite(y).all()
    for tensor in (state.memory, state.statistic):
        assert tensor is None or tensor.dtype == torch.float32
    assert state.state_bytes == 2 * mixer.state_bytes(5)


@every_card
@pytest.mark.parametrize("token", [0, 3, 6])
def test_no_output_sees_a_later_token(card: str, token: int, mixer_of: Callable[..., Mixer]) -> None:
    mixer = mixer_of(card)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    changed = x.clone()
    changed[:, token] += 1
    before, after = mixer(x), mixer(changed)
    torch.testing.assert_close(after[:, :token], before[:, :token], rtol=1e-12, atol=1e-12)
    assert (after[:, token] - before[:, token]).abs().max() > 1e-6


@every_card
def test_sequences_of_a_batch_do_not_meet(card: str, mixer_of: Callable[..., Mixer]) -> None:
    mixer = mixer_of(card)
    x = torch.randn(3, 6, 12, dtype=torch.float64)
    alone = torch.cat([mixer(one) for one in x.split(1)])
    torch.testing.assert_close(mixer(x), alone, rtol=1e-12, atol=1e-12)


@every_card
def test_a_saved_state_continues_the_sequence(card: str, mixer_of: Callable[..., Mixer]) -> None:
    mixer = mixer_of(card)
    x = torch.randn(2, 8, 12, dtype=torch.float64)
    with torch.no_grad():
        whole = mixer(x)
        _, state = mixer(x[:, :5], state=mixer.initial_state(2))
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        for restored in (torch.load(file, weights_only=False), copy.deepcopy(state)):
            y, _ = mixer(x[:, 5:], state=restored)
            torch.testing.assert_close(y, whole[:, 5:], rtol=1e-12, atol=1e-12)


@every_card
def test_a_state_is_not_changed_by_its_use(card: str, mixer_of: Callable[..., Mixer]) -> None:
    """One prompt can be continued in several ways."""
    mixer = mixer_of(card)
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    with torch.no_grad():
        _, state = mixer(x[:, :4], state=mixer.initial_state(2))
        before = [tensor.clone() for tensor in state.tensors()]
        first, _ = mixer(x[:, 4:], state=state)
        second, _ = mixer(x[:, 4:], state=state)
    assert torch.equal(first, second)
    assert all(torch.equal(one, other) for one, other in zip(before, state.tensors(), strict=True))


@every_card
@pytest.mark.parametrize(
    ("width", "heads", "block"), [(1, 1, {}), (7, 1, {"short_conv": 1}), (6, 6, {}), (3, 2, {"head_width": 3})]
)
def test_odd_sizes(card: str, width: int, heads: int, block: dict[str, Any]) -> None:
    mixer = Mixer(registry.load(card), width=width, heads=heads, seed=0, **block)
    x = torch.randn(2, 3, width, requires_grad=True)
    y = mixer(x)
    assert y.shape == (2, 3, width)
    y.sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_autocast_trains_every_card_in_bfloat16() -> None:
    for card in CARDS:
        model, tokens = model_of(card), torch.randint(11, (2, 6))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(tokens).float().square().mean()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters()), card


def test_a_pattern_of_specs_is_repeated_down_the_layers() -> None:
    pattern = [registry.load("gdn"), registry.load("softmax")]
    model = LanguageModel(pattern, vocab=5, width=8, layers=5, heads=2)
    kinds = [type(block.mixer).__name__ for block in model.blocks]
    assert kinds == ["RecurrentMixer", "SoftmaxAttention", "RecurrentMixer", "SoftmaxAttention", "RecurrentMixer"]
    tokens = torch.randint(5, (1, 6))
    whole, (logits, _) = model(tokens), model(tokens, state=model.initial_state(1))
    torch.testing.assert_close(logits, whole)
    assert model.backend(torch.device("cpu")) == "sdpa+torch"


def test_only_matrices_are_decayed_and_no_component() -> None:
    model = LanguageModel(
        registry.load("pkda"), vocab=5, width=8, layers=1, heads=2, mlp_ratio=1.0, tied=False, output_gate="silu", skip=True
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept = model.decay_groups()
    block = "blocks.0.mixer"
    assert sorted(names[id(p)] for p in decayed) == sorted(
        [f"{block}.{part}.weight" for part in ("in_proj", "conv", "gate_proj", "out_proj")]
        + ["blocks.0.mlp.gate_up.weight", "blocks.0.mlp.down.weight", "head.weight"]
    )
    assert len(decayed) + len(kept) == len(names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "heads: 5 does not divide width 12; nearest: 4 (or set block.head_width)"),
        ({"heads": 0}, "heads: 0 is not a positive integer"),
        ({"heads": True}, "heads: True is not a positive integer"),
        ({"width": 12.0}, "width: 12.0 is not a positive integer"),
        ({"expand_v": 0.3}, "block.expand_v: 0.3 times the key width 6 is not a whole number"),
        ({"short_cov": 3}, "block.short_cov: unknown key 'short_cov'. Did you mean 'short_conv'?"),
        ({"short_conv": -1}, "block.short_conv: -1 is out of range (from 0 to 64)"),
        ({"output_gate": "relu"}, "block.output_gate: unknown value 'relu'."),
    ],
)
def test_sizes_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    for build in (Mixer, lambda spec, **sizes: LanguageModel(spec, vocab=3, layers=1, **sizes)):
        with pytest.raises(UserError) as error:
            build(registry.load("gdn"), **{"width": 12, "heads": 2, **options})
        assert str(error.value).startswith(message)


@pytest.mark.parametrize("spec", ["gdn", 3, None, [], ["gdn"], {"card": "gdn"}])
def test_what_is_no_spec(spec: Any) -> None:
    with pytest.raises(UserError, match="spec: expected a"):
        LanguageModel(spec, vocab=3, width=4, layers=1, heads=1)
    with pytest.raises(UserError, match="spec: expected a RecurrenceSpec"):
        Mixer(spec, width=4, heads=1)


@pytest.mark.parametrize(
    "options", [{"vocab": 0}, {"layers": "2"}, {"mlp_ratio": -1}, {"mlp_ratio": float("nan")}, {"mlp_ratio": "4"}]
)
def test_a_language_model_says_which_size_is_wrong(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"^{next(iter(options))}: "):
        LanguageModel(registry.load("gdn"), **{"vocab": 3, "width": 4, "layers": 1, "heads": 1, **options})


def test_attention_at_a_position_is_the_textbook_formula(mixer_of: Callable[..., Mixer]) -> None:
    mixer = mixer_of("softmax", width=4, heads=1, short_conv=0)
    x = torch.randn(1, 5, 4, dtype=torch.float64)
    q, k, v = (x[0] @ mixer.in_proj.weight.T).split(4, dim=-1)

    def rotated(row: Tensor, position: int) -> Tensor:
        angle = torch.tensor([position * 1.0, position * 0.01], dtype=torch.float32).double()
        a, b = row[:2], row[2:]
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()])

    outputs = []
    for t in range(5):
        scores = torch.stack([rotated(q[t], t) @ rotated(k[i], i) / 2 for i in range(t + 1)])
        outputs.append(scores.softmax(0) @ v[: t + 1])
    expected = torch.stack(outputs) @ mixer.out_proj.weight.T
    torch.testing.assert_close(mixer(x)[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["gdn", "osdn", "softmax"])
def test_a_mixer_can_be_copied_and_pickled(name: str) -> None:
    mixer = Mixer(registry.load(name), width=8, heads=2, seed=0)
    x = torch.randn(1, 5, 8)
    for twin in (copy.deepcopy(mixer), pickle.loads(pickle.dumps(mixer))):
        assert type(twin) is type(mixer)
        assert torch.equal(twin(x), mixer(x))
