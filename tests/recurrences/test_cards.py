"""Every shipped card as a mixer and as a language model: it trains, is causal, and its sizes are what they say they are."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from deltalab import LanguageModel, Mixer, registry
from deltalab.errors import UserError

from .support import CARDS, every_card, mixer_of, model_of, tokens

PROMISED = (
    "linear_attention retnet mamba2 gla longhorn deltanet gdn kda kla pdn pgdn pkda osdn osdn_apf osdn_bounded osgdn oskda comba "
    "deltaproduct gated_deltaproduct gdn2 efla rls pla mesanet softmax sliding_window"
)


def test_the_cards_that_are_promised_are_there() -> None:
    assert set(CARDS) == set(PROMISED.split())


@every_card
def test_a_card_says_what_it_is(card: str) -> None:
    about = registry.load(card).about
    assert all((about.title, about.equation.strip(), about.source))
    assert registry.load(card).warnings() == []


@every_card
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_gets_a_gradient(card: str, tied: bool) -> None:
    """No exception is needed: even OSDN's d_1 = 0, where nothing is written at first, has one."""
    model = model_of(card, mlp_ratio=2.0, tied=tied)
    text = torch.randint(11, (2, 9))
    loss = cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
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
    text = torch.arange(18).remainder(11).expand(2, -1)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(8):
        loss = cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@every_card
@pytest.mark.parametrize("token", [0, 3, 6])
def test_no_output_sees_a_later_token(card: str, token: int) -> None:
    mixer, x = mixer_of(card), tokens(length=7)
    changed = x.clone()
    changed[:, token] += 1
    before, after = mixer(x), mixer(changed)
    torch.testing.assert_close(after[:, :token], before[:, :token], rtol=1e-12, atol=1e-12)
    assert (after[:, token] - before[:, token]).abs().max() > 1e-6


@every_card
def test_sequences_of_a_batch_do_not_meet(card: str) -> None:
    mixer, x = mixer_of(card), tokens(batch=3)
    alone = torch.cat([mixer(one) for one in x.split(1)])
    torch.testing.assert_close(mixer(x), alone, rtol=1e-12, atol=1e-12)


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


@pytest.mark.parametrize(("groups", "shares"), [(1, (0, 0, 0, 0)), (2, (0, 0, 1, 1)), (0, (0, 1, 2, 3))])
def test_key_heads_are_shared_by_neighbours(groups: int, shares: tuple[int, ...]) -> None:
    """As Mamba-2 shares its B and C: heads 0, 1 have one q and k, heads 2, 3 another; v is each head's own."""
    mixer, x = mixer_of("gdn", heads=4, head_width=3, key_heads=groups), tokens(length=4)
    q, _, k, v, _ = mixer._project(x, None)
    for part in (q, k):
        equal = [[torch.equal(part[:, :, i], part[:, :, j]) for j in range(4)] for i in range(4)]
        assert equal == [[one == other for other in shares] for one in shares]
    assert not any(torch.equal(v[:, :, 0], v[:, :, j]) for j in (1, 2, 3))
    assert mixer.sizes == [3 * (groups or 4), 3 * (groups or 4), 12]


def test_a_pattern_of_specs_is_repeated_down_the_layers() -> None:
    pattern = [registry.load("gdn"), registry.load("softmax")]
    model = LanguageModel(pattern, vocab=5, width=8, layers=5, heads=2)
    kinds = [type(block.mixer).__name__ for block in model.blocks]
    assert kinds == ["RecurrentMixer", "SoftmaxAttention", "RecurrentMixer", "SoftmaxAttention", "RecurrentMixer"]
    text = torch.randint(5, (1, 6))
    whole, (logits, _) = model(text), model(text, state=model.initial_state(1))
    torch.testing.assert_close(logits, whole)
    assert model.backend(torch.device("cpu")) == "sdpa+torch"


def test_only_matrices_are_decayed_and_no_component() -> None:
    model = model_of("pkda", vocab=5, width=8, layers=1, mlp_ratio=1.0, tied=False, output_gate="silu", skip=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, kept = model.decay_groups()
    block = "blocks.0.mixer"
    assert sorted(names[id(p)] for p in decayed) == sorted(
        [f"{block}.{part}.weight" for part in ("in_proj", "conv", "gate_proj", "out_proj")]
        + ["blocks.0.mlp.gate_up.weight", "blocks.0.mlp.down.weight", "head.weight"]
    )
    assert len(decayed) + len(kept) == len(names)


SIZES = [
    ({"heads": 5}, "heads: 5 does not divide width 12; nearest: 4 (or set block.head_width)"),
    ({"heads": 0}, "heads: 0 is not a positive integer"),
    ({"heads": True}, "heads: True is not a positive integer"),
    ({"width": 12.0}, "width: 12.0 is not a positive integer"),
    ({"expand_v": 0.3}, "block.expand_v: 0.3 times the key width 6 is not a whole number"),
    ({"key_heads": 3, "heads": 4}, "block.key_heads: 3 does not divide heads 4; nearest: 2"),
    ({"short_cov": 3}, "block.short_cov: unknown key 'short_cov'. Did you mean 'short_conv'?"),
    ({"short_conv": -1}, "block.short_conv: -1 is out of range (from 0 to 64)"),
    ({"output_gate": "relu"}, "block.output_gate: unknown value 'relu'."),
]


@pytest.mark.parametrize(("options", "message"), SIZES)
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


@every_card
def test_a_mixer_can_be_copied_and_pickled(card: str) -> None:
    mixer = Mixer(registry.load(card), width=8, heads=2, seed=0)
    x = torch.randn(1, 5, 8)
    for twin in (copy.deepcopy(mixer), pickle.loads(pickle.dumps(mixer))):
        assert type(twin) is type(mixer)
        assert torch.equal(twin(x), mixer(x))
