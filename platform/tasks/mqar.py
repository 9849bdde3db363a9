"""`mqar`: multi-query associative recall (Arora, Eyuboglu et al., "Zoology", arXiv:2312.04927, section 4 and appendix).

One example of T = `length` tokens with p = `pairs` pairs, V = `vocab`:

    k1 v1 k2 v2 .. kp vp | the rest: (T - 2p) / 2 slots of two positions each

* keys from 1 .. V//2 - 1, values from V//2 .. V - 1, both without replacement inside an example, all choices equally likely;
* each key is queried once: it stands in the first position of a slot, drawn without replacement with weight a * i^(a - 1) for
  slot i = 1, 2, .. (a = `power`; 1 is uniform, 0.01 puts most queries early); the first pair draws first, as in Zoology;
* the target at the query is the key's value; nothing else is scored. The value is NOT fed to the model after the query: the
  position after it is filler (Zoology's inputs are the same: its labels are shifted onto the query);
* every other position is 0 (`filler: zero`) or, with `filler: random`, a token equally likely among all V except the example's
  keys. (Zoology's random filler is unseeded and may be a key; this one is seeded and never is, so every query has one answer.)

The words of a split are one stream of the bit generator PCG64 seeded with (data_seed, split); every example reads the same number
of 64-bit words, so a split of n examples is the beginning of any longer one, and neither block sizes nor workers matter. Only
numpy's BIT generator is used, whose stream is promised never to change, which `Generator`'s methods are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ...errors import UserError
from .base import IGNORE, PreparedTask, Progress, Task
from .registry import effective, register
from .store import Array, Stored, Writer, content_digest, obtain

SPLITS = ("train", "validation", "test")
_BLOCK = 1 << 20  # elements of the largest temporary array

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class MqarConfig:
    """The settings of `mqar`; the defaults are the smallest setting of Zoology's figure 2."""

    vocab: int = field(default=8192, metadata={"help": "tokens: 0, then keys, then values", "min": 4, "max": 65536})
    length: int = field(default=64, metadata={"help": "tokens of an example, even", "min": 4, "max": 65536})
    pairs: int = field(default=4, metadata={"help": "key-value pairs to remember, 4 * pairs <= length", "min": 1})
    filler: str = field(default="zero", metadata={"help": "tokens between queries", "choices": ("zero", "random")})
    power: float = field(default=0.01, metadata={"help": "queries' slots: weight i^(power - 1)", "min": 0.0, "max": 10.0})
    train_examples: int = field(default=100_000, metadata={"help": "examples to train on", "min": 1})
    validation_examples: int = field(default=3_000, metadata={"help": "examples to select on", "min": 1})
    test_examples: int = field(default=3_000, metadata={"help": "examples to report on", "min": 1})
    data_seed: int = field(default=0, metadata={"help": "seed of the data, the same for every training seed", "min": 0})

    @property
    def slots(self) -> int:
        """Where a query may stand: (T - 2p) / 2."""
        return (self.length - 2 * self.pairs) // 2

    @property
    def first_value(self) -> int:
        """Tokens from here on are values; below, from 1, keys."""
        return self.vocab // 2


class MqarSplit:
    """The examples of one split: tokens [N, T], and the position of each pair's query [N, p] in the order of the pairs."""

    def __init__(self, tokens: Array, positions: Array) -> None:
        self._tokens = tokens
        self._positions = positions

    @property
    def length(self) -> int:
        """T, the tokens of an example."""
        return int(self._tokens.shape[1])

    def __len__(self) -> int:
        return int(self._tokens.shape[0])

    def rows(self, index: Ints) -> tuple[Ints, Ints]:
        """(inputs, targets), int64 [n, T]; the targets are the values, at the positions of the queries."""
        inputs = np.asarray(self._tokens[index], dtype=np.int64)
        return inputs, _targets(inputs, np.asarray(self._positions[index], dtype=np.int64))


@register
class MqarTask(Task):
    """Remember p key-value pairs, then give the value of each key when it is asked for."""

    name: ClassVar[str] = "mqar"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "multi-query associative recall: key-value pairs, then each key asked for once (Zoology)"
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    presets: ClassVar = {
        "quick": {
            "vocab": 256,
            "length": 64,
            "pairs": 8,
            "train_examples": 20_000,
            "validation_examples": 1_000,
            "test_examples": 1_000,
        },
        **{f"zoology-fig2-{length}": {"length": length, "pairs": p} for length, p in ((64, 4), (128, 8), (256, 16), (512, 64))},
    }
    Config = MqarConfig

    config: MqarConfig

    def __init__(self, config: MqarConfig, path: str = "task") -> None:
        super().__init__(config, path)
        c = config
        if c.length % 2:
            raise UserError(
                f"{path}.length: {c.length} is odd; pairs and queries stand on an even grid: {c.length - 1} or {c.length + 1}"
            )
        if 4 * c.pairs > c.length:
            raise UserError(
                f"{path}.pairs: {c.pairs} pairs need a length of at least {4 * c.pairs} (4 * pairs), but {path}.length is "
                f"{c.length}. Valid here: pairs from 1 to {c.length // 4}"
            )
        if c.pairs > c.first_value - 1:
            raise UserError(
                f"{path}.pairs: {c.pairs} distinct keys do not fit {path}.vocab {c.vocab}, which has {c.first_value - 1} keys "
                f"(vocab // 2 - 1); vocab must be at least {2 * c.pairs + 2}"
            )

    def fingerprint(self) -> str:
        """Of the settings and the version: they determine every token."""
        return content_digest(effective(self))

    def prepare(self, cache: Path, progress: Progress | None = None) -> PreparedTask:
        """Generate the three splits, or memory-map them. The oracle is measured on every example while they are generated."""
        stored = obtain(cache, f"{self.name}-{self.fingerprint()}", lambda writer: self._generate(writer, progress))
        return PreparedTask(
            name=self.name,
            version=self.version,
            train=_split(stored, "train"),
            validation=_split(stored, "validation"),
            test=_split(stored, "test"),
            vocab=self.config.vocab,
            length=self.config.length,
            digest=content_digest({"task": self.name, "version": self.version, "content": stored.digest}),
            chance=1 / (self.config.vocab - self.config.first_value),
            details=stored.facts,
        )

    def _generate(self, writer: Writer, progress: Progress | None) -> dict[str, Any]:
        c = self.config
        counts = {split: int(getattr(c, f"{split}_examples")) for split in SPLITS}
        right = done = 0
        for split, count in counts.items():
            tokens = writer.create(f"{split}.tokens", np.min_scalar_type(c.vocab - 1), (count, c.length))
            positions = writer.create(f"{split}.positions", np.min_scalar_type(c.length - 1), (count, c.pairs))
            for block, queries in examples(c, split, count):
                tokens.append(block)
                positions.append(queries)
                right += int((oracle(block, c)[np.arange(len(block))[:, None], queries] == block[:, 1 : 2 * c.pairs : 2]).sum())
                done += len(block)
                if progress is not None:
                    progress("generating mqar", done, sum(counts.values()))
        accuracy = right / (done * c.pairs)
        assert accuracy == 1.0, f"mqar asks what cannot be answered: the oracle's accuracy is {accuracy}"
        return {
            "oracle_accuracy": accuracy,
            "examples": counts,
            "scored_per_example": c.pairs,
            "tokens": {split: count * c.length for split, count in counts.items()},
        }


def examples(config: MqarConfig, split: str, count: int) -> Iterator[tuple[Ints, Ints]]:
    """The first `count` examples of a split, in blocks: tokens int64 [n, T], positions of the queries int64 [n, p]."""
    seed = np.random.SeedSequence(config.data_seed, spawn_key=(SPLITS.index(split),))
    bits = np.random.PCG64(seed)
    filler = config.length - 2 * config.pairs if config.filler == "random" else 0
    words = 2 * config.pairs + config.slots + filler
    rows = max(1, _BLOCK // max(words, config.vocab - config.first_value, config.length))
    for start in range(0, count, rows):
        n = min(rows, count - start)
        raw = np.asarray(bits.random_raw(n * words), dtype=np.uint64)
        uniform = (raw >> np.uint64(11)).reshape(n, words) * 2.0**-53  # [0, 1), every multiple of 2^-53 equally likely
        yield _assemble(config, uniform.astype(np.float64, copy=False))


def oracle(tokens: Ints, config: MqarConfig) -> Ints:
    """The answer at every position, found from the tokens alone: the value that stood beside this token among the pairs; else 0.

    tokens int64 [n, T] -> int64 [n, T]. It shares no intermediate result with the generator.
    """
    row = np.arange(len(tokens))[:, None]
    memory = np.zeros((len(tokens), config.vocab), dtype=np.int32)
    memory[row, tokens[:, 0 : 2 * config.pairs : 2]] = tokens[:, 1 : 2 * config.pairs : 2]
    return memory[row, tokens].astype(np.int64)


def _assemble(config: MqarConfig, uniform: Floats) -> tuple[Ints, Ints]:
    """Examples out of their random numbers [n, words]: p for keys, p for values, one per slot, one per filler position."""
    p, context = config.pairs, 2 * config.pairs
    keys = _distinct(uniform[:, :p], config.first_value - 1) + 1
    values = _distinct(uniform[:, p:context], config.vocab - config.first_value) + config.first_value
    positions = context + 2 * _draw_slots(uniform[:, context : context + config.slots], config.power, p)
    tokens = np.zeros((len(uniform), config.length), dtype=np.int64)
    if config.filler == "random":
        tokens[:, context:] = _avoiding(uniform[:, context + config.slots :], keys, config.vocab)
    tokens[:, 0:context:2] = keys
    tokens[:, 1:context:2] = values
    np.put_along_axis(tokens, positions, keys, axis=1)
    return tokens, positions


def _distinct(uniform: Floats, n: int) -> Ints:
    """p distinct numbers out of 0 .. n - 1 per row, in random order: the first p steps of a Fisher-Yates shuffle. [rows, p]."""
    rows, p = uniform.shape
    step = np.arange(p)
    other = step + (uniform * (n - step)).astype(np.int64)
    pool = np.empty((rows, n), dtype=np.min_scalar_type(n))
    pool[:] = np.arange(n)
    row = np.arange(rows)
    for j in range(p):
        chosen = pool[row, other[:, j]]
        pool[row, other[:, j]] = pool[:, j]
        pool[:, j] = chosen
    return pool[:, :p].astype(np.int64)


def _draw_slots(uniform: Floats, power: float, p: int) -> Ints:
    """p of the s slots per row in the order they are drawn, without replacement, slot i with weight i^(power - 1). [rows, p].

    Slot i rings after an exponential time of rate i^(power - 1); the order in which they ring is the order of such a draw.
    """
    slots = uniform.shape[1]
    times = -np.log1p(-uniform) * np.arange(1, slots + 1) ** (1.0 - power)
    if p < slots // 2:
        early = np.argpartition(times, p - 1, axis=1)[:, :p]
        order = np.argsort(np.take_along_axis(times, early, axis=1), axis=1)
        drawn = np.take_along_axis(early, order, axis=1)
    else:
        drawn = np.argsort(times, axis=1)[:, :p]
    return drawn.astype(np.int64, copy=False)


def _avoiding(uniform: Floats, keys: Ints, vocab: int) -> Ints:
    """Tokens equally likely among all that are not keys of their row: the r-th such token, found by stepping over the keys."""
    tokens: NDArray[np.int32] = (uniform * (vocab - keys.shape[1])).astype(np.int32)
    for key in np.sort(keys, axis=1).T:
        tokens += tokens >= key[:, None]
    return tokens.astype(np.int64)


def _targets(inputs: Ints, positions: Ints) -> Ints:
    targets = np.full(inputs.shape, IGNORE, dtype=np.int64)
    np.put_along_axis(targets, positions, inputs[:, 1 : 2 * positions.shape[1] : 2], axis=1)
    return targets


def _split(stored: Stored, name: str) -> MqarSplit:
    return MqarSplit(stored.arrays[f"{name}.tokens"], stored.arrays[f"{name}.positions"])
