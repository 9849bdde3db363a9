"""A package of somebody else, in which every task has one fault; the class's name says which."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from sound_tasks import Countdown, Held, Maximum

from deltalab.platform.tasks import IGNORE, PreparedTask, Progress, register
from deltalab.platform.tasks.store import content_digest, obtain
from deltalab.strict import option


def faulty(cls: Any) -> Any:
    """Registers a task under its class's name: SeesTheClock -> sees_the_clock."""
    cls.name = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in cls.__name__).lstrip("_")
    return register(cls)


@faulty
class Unexplained(Maximum):
    """A setting without a word about it."""

    @dataclass(frozen=True)
    class Config(Maximum.Config):
        depth: int = option(1)


@faulty
class BrokenPreset(Maximum):
    """A preset that cannot be built."""

    presets: ClassVar = {"quick": {"length": 1}}


@faulty
class AnythingGoes(Maximum):
    """A setting of no type."""

    @dataclass(frozen=True)
    class Config(Maximum.Config):
        mode: Any = option("plain", "what is done")


@faulty
class DividesByZero(Maximum):
    """A limit that no one tried."""

    @dataclass(frozen=True)
    class Config(Maximum.Config):
        stride: int = option(1, "a stride", min=0)

    def __init__(self, config: Any, path: str = "task") -> None:
        super().__init__(config, path)
        self.steps = config.length // config.stride


@faulty
class Narrow(Countdown):
    """Rows of int32."""

    def prepare(self, cache: Path, progress: Progress | None = None) -> PreparedTask:
        data = super().prepare(cache, progress)
        narrow = {
            split: Held(held.inputs.astype(np.int32), held.targets.astype(np.int32))
            for split, held in ((name, getattr(data, name)) for name in ("train", "validation", "test"))
        }
        return dataclasses.replace(data, **narrow)


class _Window(Held):
    def rows(self, index: Any) -> tuple[Any, Any]:
        if np.array_equal(index, np.arange(len(index))):
            return self.inputs[: len(index)], self.targets[: len(index)]
        return super().rows(index)


@faulty
class LendsItsArrays(Countdown):
    """Rows that are a view of what is kept."""

    def prepare(self, cache: Path, progress: Progress | None = None) -> PreparedTask:
        data = super().prepare(cache, progress)
        return dataclasses.replace(data, train=_Window(data.train.inputs, data.train.targets))


@faulty
class OneTokenTooMany(Maximum):
    """A target beyond the vocabulary."""

    def targets(self, examples: Any) -> Any:
        found = super().targets(examples)
        found[:, -1] = self.vocab
        return found

    def oracle(self, tokens: Any) -> Any:
        answers = super().oracle(tokens)
        answers[:, -1] = self.vocab
        return answers


@faulty
class NothingAsked(Maximum):
    """Examples that ask nothing where they begin with a low symbol."""

    def targets(self, examples: Any) -> Any:
        found = super().targets(examples)
        found[examples["tokens"][:, 0] < self.vocab // 4] = IGNORE
        return found


@faulty
class SeesTheClock(Maximum):
    """Other examples every time."""

    def generate(self, words: Any) -> dict[str, Any]:
        noise = np.frombuffer(os.urandom(8 * words.size), dtype=np.uint64).reshape(words.shape)
        return super().generate(words ^ noise)


@faulty
class IgnoresItsSeed(Countdown):
    """The same examples whatever the seed."""

    def prepare(self, cache: Path, progress: Progress | None = None) -> PreparedTask:
        held, self.config = self.config, dataclasses.replace(self.config, data_seed=0)
        try:
            return super().prepare(cache, progress)
        finally:
            self.config = held


@faulty
class HashesText(Maximum):
    """Examples that depend on the process's hash seed."""

    def generate(self, words: Any) -> dict[str, Any]:
        return super().generate(words ^ np.uint64(hash("a text") % 2**63))


@faulty
class CountsItsBlock(Maximum):
    """Examples that depend on their place in the block that is made at once."""

    def generate(self, words: Any) -> dict[str, Any]:
        place = np.arange(len(words), dtype=np.uint64)[:, None]
        return super().generate(words ^ (place << np.uint64(56)))


@faulty
class TestsOnItsTraining(Countdown):
    """Validation and test are what is trained on."""

    def prepare(self, cache: Path, progress: Progress | None = None) -> PreparedTask:
        data = super().prepare(cache, progress)
        return dataclasses.replace(data, validation=data.train, test=data.train)


@faulty
class ForgetsASetting(Maximum):
    """A fingerprint without the vocabulary: one cache for two different data."""

    def fingerprint(self) -> str:
        own = dataclasses.asdict(self.config)
        return content_digest({**own, "name": self.name, "vocab": 0})


@faulty
class OneCacheForAll(Countdown):
    """Data kept under the name of the task alone."""

    def prepare(self, cache: Path, progress: Progress | None = None) -> PreparedTask:
        data = super().prepare(cache, progress)

        def write(writer: Any) -> dict[str, Any]:
            for split in ("train", "validation", "test"):
                held = getattr(data, split)
                for what in ("inputs", "targets"):
                    values = getattr(held, what)
                    writer.create(f"{split}.{what}", np.int64, values.shape).append(values)
            return {}

        stored = obtain(cache, self.name, write)
        splits = {
            split: Held(stored.arrays[f"{split}.inputs"], stored.arrays[f"{split}.targets"])
            for split in ("train", "validation", "test")
        }
        return dataclasses.replace(data, **splits, digest=stored.digest)


@faulty
class ChanceInPercent(Maximum):
    """A chance level of 50."""

    @property
    def chance(self) -> float:
        return 50.0


@faulty
class AsksTheUnknowable(Maximum):
    """The target is the next symbol, which no one can know."""

    def targets(self, examples: Any) -> Any:
        found = np.asarray(examples["tokens"], dtype=np.int64).copy()
        found[:, :-1], found[:, -1] = found[:, 1:], IGNORE
        return found


@faulty
class LabelsEverything(Maximum):
    """A facet of positions that are not scored."""

    def labels(self, examples: Any) -> Any:
        return {"position": np.zeros(examples["tokens"].shape, dtype=np.int64)}


@faulty
class StaysShort(Maximum):
    """Longer examples that are as long as before."""

    def longer(self, factor: int) -> dict[str, object]:
        return {"vocab": self.config.vocab}


@faulty
class NoLength(Countdown):
    """No setting `length`, and no `longer`."""

    @dataclass(frozen=True)
    class Config:
        numbers: int = option(8, "numbers of an example", min=2, max=64)
        count: int = option(64, "examples of each split", min=1, max=4096)
        data_seed: int = option(0, "seed of the data", min=0)

    def __init__(self, config: Any, path: str = "task") -> None:
        self.config, self.path = config, path
