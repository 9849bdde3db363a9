"""A preset: the language model of a paper, all of it but the recurrence, as data.

Papers give their variants other layers, heads or output gates, often to spend the same number of parameters. Such a `Variation`
belongs to the cards that it names; two arms that take different ones differ in more than their recurrence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import UserError, unknown
from ..strict import build, item, join, option
from .language_model import LanguageModel
from .settings import Block
from .spec import MixerSpec

AUTO, NO_VARIATION = "auto", "none"


@dataclass(frozen=True)
class Variation:
    """What a source does otherwise for some of its recurrences."""

    cards: tuple[str, ...] = option(help="the recurrences that it belongs to")
    layers: int = option(0, "number of blocks; 0: the preset's", min=0, max=1024)
    heads: int = option(0, "number of heads; 0: the preset's", min=0, max=4096)
    block: dict[str, Any] = option(factory=dict, help="settings of the mixer's block, over the preset's")


@dataclass(frozen=True)
class TrainingSetup:
    """How a source trains its models. Told, not applied: a study says its own `training`."""

    data: str = option("", "corpus")
    context: int = option(0, "tokens of a sequence; 0: not told", min=0)
    tokens_per_step: int = option(0, "tokens of an optimiser step, all devices together; 0: not told", min=0)
    steps: int = option(0, "optimiser steps; 0: not told", min=0)
    optimiser: str = option("adamw", "its name")
    lr: float = option(0.0, "peak learning rate; 0: not told", min=0)
    schedule: Literal["cosine", "linear", "constant"] = option("cosine", "how the learning rate falls")
    final_lr: float = option(1.0, "learning rate at the end / peak", min=0, max=1)
    warmup_steps: int | None = option(None, "steps with a rising learning rate; null: not told", min=0)
    weight_decay: float | None = option(None, "of the optimiser; null: not told", min=0)
    clip: float | None = option(None, "largest gradient norm; null: not told", min=0)
    seed: int | None = option(None, "the seed of the one run; null: not told", min=0)


@dataclass(frozen=True)
class Preset:
    """The shape of a published language model.

    preset = registry.presets.load("pdn-1b")
    model = preset.language_model(registry.load("pkda"), seed=0)
    preset.settings("pkda")            # the same as data: vocab, width, layers, heads, mlp_hidden, tied, init_std, block
    """

    name: str = option(help="its name")
    title: str = option(help="one line")
    source: str = option(help="paper and whose code the numbers are from")
    vocab: int = option(help="tokens of the vocabulary", min=1)
    width: int = option(help="model width", min=1, max=65536)
    layers: int = option(help="number of blocks", min=1, max=1024)
    heads: int = option(help="number of heads", min=1, max=4096)
    mlp_hidden: int = option(0, "hidden width of the SwiGLU; 0: no MLP", min=0)
    tied: bool = option(True, "share embedding and head")
    init_std: float = option(0.02, "standard deviation of the projections' initial weights", above=0, max=10)
    block: dict[str, Any] = option(factory=dict, help="settings of the mixer's block, for every card")
    aliases: tuple[str, ...] = option((), "other names")
    cards: tuple[str, ...] = option((), "the recurrences that the source trained in this shape")
    variations: tuple[Variation, ...] = option((), "for some of the cards")
    training: TrainingSetup = field(default_factory=TrainingSetup)
    parameters: dict[str, Any] = option(factory=dict, help="card -> published number of parameters, as it is printed")
    caveats: tuple[str, ...] = option((), "what a user should know")

    def __post_init__(self) -> None:
        """The blocks are settings of a block, no card has two variations, and every card that a variation names is different."""
        build(Block, self.block, "block")
        seen: set[str] = set()
        for i, variation in enumerate(self.variations):
            path = item("variations", i)
            build(Block, variation.block, join(path, "block"))
            for card in variation.cards:
                if card in (*seen, AUTO, NO_VARIATION):
                    raise UserError(f"{join(path, 'cards')}: {card!r} has a variation already, or is no card")
                seen.add(card)

    def varied_cards(self) -> tuple[str, ...]:
        """The cards that have a variation."""
        return tuple(card for variation in self.variations for card in variation.cards)

    def variation(self, choice: str, card: str, path: str = "variation") -> Variation | None:
        """The variation that `choice` means: `auto`: the card's own, if it has one; `none`; or that of the card it names."""
        if choice == NO_VARIATION:
            return None
        wanted = card if choice == AUTO else choice
        found = next((variation for variation in self.variations if wanted in variation.cards), None)
        if found is None and choice != AUTO:
            raise unknown(f"variation of {self.name}", choice, (AUTO, NO_VARIATION, *self.varied_cards()), path)
        return found

    def settings(self, card: str = "", variation: str = AUTO, path: str = "variation") -> dict[str, Any]:
        """All of the model but its recurrence: vocab, width, layers, heads, mlp_hidden, tied, init_std, block."""
        chosen = self.variation(variation, card, path) or Variation(())
        return {
            "vocab": self.vocab,
            "width": self.width,
            "layers": chosen.layers or self.layers,
            "heads": chosen.heads or self.heads,
            "mlp_hidden": self.mlp_hidden,
            "tied": self.tied,
            "init_std": self.init_std,
            "block": {**self.block, **chosen.block},
        }

    def language_model(self, spec: MixerSpec, *, variation: str = AUTO, **changes: Any) -> LanguageModel:
        """A LanguageModel of this shape. `changes` are its keywords, over the preset's: `seed=0`, `width=512`, ...

        `variation`: `auto`: that of the spec's card; `none`; or a card's name, to take that card's.
        """
        settings = self.settings(spec.name, variation)
        block = settings.pop("block")
        return LanguageModel(spec, **merged({**settings, **block}, changes))


def merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a model with changes over them; of the two ways to give the MLP's width, the change's is the one that holds."""
    other = {"mlp_ratio": "mlp_hidden", "mlp_hidden": "mlp_ratio"}
    dropped = {other[key] for key in changes if key in other} - changes.keys()
    return {**{key: value for key, value in settings.items() if key not in dropped}, **changes}
