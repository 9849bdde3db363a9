"""`mad_recall` and `mad_noisy_recall`: in-context recall of MAD (see `mad`), without and with noise.

One example of T = `length` tokens is T / 2 slots of two tokens. With V = `vocab` - `noise_vocab`:

    k1 v1 | k2 v2 | n n | k1 v1 | ... | k v        the value is asked for at every key that has stood before

* a slot is noise with probability `noise` (two tokens of the `noise_vocab` highest, equally likely), except one slot drawn at
  random, which never is; otherwise it has a key from 0 .. V//2 - 1, all equally likely. Keys come again;
* a key's value, from V//2 .. V - 1, is drawn where it stands first and is the same in the whole example;
* the key of the last slot is one that has stood before, all equally likely: every example asks at least once;
* the target at a key that has stood before is its value, which is what the model reads next. Nothing else is scored.

MAD draws the slot that is never noise among all slots, the last one included, whose draw then protects none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...errors import UserError
from ...strict import option
from .base import IGNORE
from .draws import Ints, Words, integers, octave, octaves, uniform
from .mad import EXAMPLES, MadConfig, ladder
from .registry import register
from .repeats import pick, repeats
from .synthetic import Examples, SyntheticTask

_VOCABULARIES, _LENGTHS = (32, 64, 128), (256, 512, 1024)
_QUICK = {"length": 64, "train_examples": 6_400, "validation_examples": 640, "test_examples": 640}


@dataclass(frozen=True)
class RecallConfig(MadConfig):
    """The settings of `mad_recall`; the defaults are MAD's baseline."""

    vocab: int = option(16, "tokens: keys, then as many values", min=4, max=65536)
    length: int = option(128, "tokens of an example, even", min=4, max=65536)


@dataclass(frozen=True)
class NoisyRecallConfig(MadConfig):
    """The settings of `mad_noisy_recall`; the defaults are MAD's baseline."""

    vocab: int = option(32, "tokens: keys, then as many values, then noise", min=5, max=65536)
    noise_vocab: int = option(16, "of them noise", min=1, max=65532)
    noise: float = option(0.2, "how much of the slots is noise", min=0.0, below=1.0)
    length: int = option(128, "tokens of an example, even", min=4, max=65536)


class _Recall(SyntheticTask):
    """Recall among slots of two tokens."""

    config: Any

    def __init__(self, config: Any, path: str = "task") -> None:
        super().__init__(config, path)
        if config.length % 2:
            raise UserError(
                f"{path}.length: {config.length} is odd; slots have two tokens: {config.length - 1} or {config.length + 1}"
            )
        noise_vocab = int(getattr(config, "noise_vocab", 0))
        if config.vocab - noise_vocab < 4:
            raise UserError(
                f"{path}.noise_vocab: {noise_vocab} of {path}.vocab {config.vocab} leave {config.vocab - noise_vocab} tokens for "
                f"keys and values, which need 4. Valid here: noise_vocab from 1 to {config.vocab - 4}"
            )
        self.pairs = int(config.length) // 2
        self.noise = float(getattr(config, "noise", 0.0))
        self.noise_vocab = noise_vocab
        self.keys = (int(config.vocab) - noise_vocab) // 2
        self.values = int(config.vocab) - noise_vocab - self.keys

    @property
    def vocab(self) -> int:
        """The number of tokens."""
        return int(self.config.vocab)

    @property
    def words(self) -> int:
        """For each slot key and value, and of noise whether and which; the last key, and the slot that is no noise."""
        return 2 * self.pairs + 1 + (3 * self.pairs + 1 if self.noise else 0)

    @property
    def chance(self) -> float:
        """One of the values."""
        return 1 / self.values

    @property
    def facets(self) -> Mapping[str, tuple[str, ...]]:
        """Tokens between a key's last value and the key that asks for it."""
        return {"distance": octaves(self.config.length)}

    def highest(self, name: str) -> int:
        """Tokens, or distances."""
        return self.vocab - 1 if name == "tokens" else int(self.config.length)

    def generate(self, words: Words) -> dict[str, Ints]:
        """tokens [n, T], and for each slot [n, T/2] the distance to its key's last value; 0 where nothing is asked."""
        n, p, numbers = len(words), self.pairs, uniform(words)
        slot, row = np.arange(p), np.arange(n)
        key, noisy = integers(numbers[:, :p], self.keys), np.zeros((n, p), dtype=bool)
        if self.noise:
            noisy = numbers[:, 2 * p + 1 : 3 * p + 1] < self.noise
            noisy[row, integers(numbers[:, 3 * p + 1], p - 1)] = False
            noisy[:, -1] = False
        ids = np.where(noisy, -1 - slot, key)  # noise is like nothing else
        first, _ = repeats(ids)
        known = (first == slot) & ~noisy
        known[:, -1] = False
        ids[:, -1] = key[row, pick(known, numbers[:, 2 * p])]
        first, previous = repeats(ids)
        value = self.keys + integers(np.take_along_axis(numbers[:, p : 2 * p], first, axis=1), self.values)
        tokens = np.stack([ids, value], axis=2)
        if self.noise:
            noise = integers(numbers[:, 3 * p + 2 :], self.noise_vocab).reshape(n, p, 2)
            tokens = np.where(noisy[:, :, None], self.keys + self.values + noise, tokens)
        distance = np.where(previous >= 0, 2 * (slot - previous) - 1, 0)
        return {"tokens": tokens.reshape(n, 2 * p), "distance": distance}

    def targets(self, examples: Examples) -> Ints:
        """The values, at the keys that have stood before."""
        found = np.full(examples["tokens"].shape, IGNORE, dtype=np.int64)
        found[:, 0::2] = np.where(examples["distance"] > 0, examples["tokens"][:, 1::2], IGNORE)
        return found

    def labels(self, examples: Examples) -> Mapping[str, Ints]:
        """The bucket of the distance, at the keys that have stood before."""
        found = np.full(examples["tokens"].shape, -1, dtype=np.int64)
        found[:, 0::2] = np.where(examples["distance"] > 0, octave(examples["distance"]), -1)
        return {"distance": found}

    def oracle(self, tokens: Ints) -> Ints:
        """What followed this token when it last stood in the first place of a slot; else 0. Slot by slot, with a memory."""
        row, answers = np.arange(len(tokens)), np.zeros_like(tokens)
        memory = np.zeros((len(tokens), self.vocab), dtype=np.int64)
        for t in range(0, tokens.shape[1], 2):
            answers[:, t] = memory[row, tokens[:, t]]
            memory[row, tokens[:, t]] = tokens[:, t + 1]
        return answers

    def rules(self, tokens: Ints) -> Mapping[str, Ints]:
        """`last_value`: what was read last."""
        return {"last_value": np.concatenate([tokens[:, :1], tokens[:, :-1]], axis=1)}


@register
class MadRecallTask(_Recall):
    """Give the value of every key that has stood in the example before."""

    name: ClassVar[str] = "mad_recall"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "in-context recall: the value of every key that has stood before (MAD)"
    presets: ClassVar = ladder(_QUICK, {"vocab": _VOCABULARIES, "length": _LENGTHS, "train_examples": EXAMPLES}, length=128)
    Config = RecallConfig


@register
class MadNoisyRecallTask(_Recall):
    """The same with pairs of noise tokens between the pairs."""

    name: ClassVar[str] = "mad_noisy_recall"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "in-context recall between tokens of noise (MAD)"
    presets: ClassVar = ladder(
        _QUICK,
        {"vocab": (48, 80, 144), "length": _LENGTHS, "train_examples": EXAMPLES, "noise": (0.4, 0.6, 0.8)},
        length=128,
        probed=("noise",),
    )
    Config = NoisyRecallConfig
