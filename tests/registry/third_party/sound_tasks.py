"""A package of somebody else: a task made of random words, and one that keeps its own data, as docs/COMPONENTS.md says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from deltalab.errors import UserError
from deltalab.platform.tasks import IGNORE, PreparedTask, Progress, SyntheticConfig, SyntheticTask, Task, register
from deltalab.platform.tasks.draws import integers, octave, octaves, uniform
from deltalab.platform.tasks.registry import identity
from deltalab.platform.tasks.store import content_digest
from deltalab.strict import option

__version__ = "1.5"


@register
class Maximum(SyntheticTask):
    """The largest symbol so far, asked for at every position but the first."""

    name: ClassVar[str] = "maximum"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "the largest symbol so far"
    presets: ClassVar = {"quick": {"length": 16}}

    @dataclass(frozen=True)
    class Config(SyntheticConfig):
        vocab: int = option(64, "symbols", min=2, max=1024)
        length: int = option(32, "symbols of an example", min=2, max=4096)

    @property
    def vocab(self) -> int:
        return int(self.config.vocab)

    @property
    def words(self) -> int:
        return int(self.config.length)

    @property
    def chance(self) -> float:
        return 1 / self.vocab

    @property
    def facets(self) -> Mapping[str, tuple[str, ...]]:
        return {"position": octaves(self.config.length)}

    def generate(self, words: Any) -> dict[str, Any]:
        return {"tokens": integers(uniform(words), self.vocab)}

    def targets(self, examples: Any) -> Any:
        found = np.maximum.accumulate(np.asarray(examples["tokens"], dtype=np.int64), axis=1)
        found[:, 0] = IGNORE
        return found

    def labels(self, examples: Any) -> Any:
        place = octave(np.arange(self.config.length))
        place[0] = -1
        return {"position": np.broadcast_to(place, examples["tokens"].shape)}

    def oracle(self, tokens: Any) -> Any:
        return np.stack([tokens[:, : t + 1].max(axis=1) for t in range(tokens.shape[1])], axis=1)

    def rules(self, tokens: Any) -> Any:
        return {"last": tokens}


class Held:
    """Rows that a task keeps in memory."""

    def __init__(self, inputs: Any, targets: Any) -> None:
        self.inputs, self.targets, self.length = inputs, targets, inputs.shape[1]

    def __len__(self) -> int:
        return len(self.inputs)

    def rows(self, index: Any) -> tuple[Any, Any]:
        return self.inputs[index], self.targets[index]


@register
class Countdown(Task):
    """Numbers that fall by a step: say the next one."""

    name: ClassVar[str] = "countdown"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "numbers that fall by a step"
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Config:
        length: int = option(8, "numbers of an example", min=2, max=64)
        count: int = option(64, "examples of each split", min=1, max=4096)
        data_seed: int = option(0, "seed of the data", min=0)

    def __init__(self, config: Any, path: str = "task") -> None:
        super().__init__(config, path)
        if config.length == 13:
            raise UserError(f"{path}.length: 13 brings bad luck; 12 or 14")

    def fingerprint(self) -> str:
        return content_digest(identity(self))

    def prepare(self, cache: Path, progress: Progress | None = None) -> PreparedTask:
        splits, c = {}, self.config
        for number, split in enumerate(("train", "validation", "test")):
            bits = np.random.PCG64(np.random.SeedSequence(c.data_seed, spawn_key=(number,))).random_raw(c.count * 2)
            start, step = (integers(uniform(bits.reshape(2, -1)), 250) + 1)[:, :, None]
            numbers = (start - step * np.arange(c.length + 1)) % 251
            splits[split] = Held(numbers[:, :-1].copy(), numbers[:, 1:].copy())
        content = {split: [held.inputs.tolist(), held.targets.tolist()] for split, held in splits.items()}
        return PreparedTask(
            name=self.name,
            version=self.version,
            **splits,
            vocab=251,
            length=c.length,
            digest=content_digest({"task": self.name, "content": content}),
            chance=1 / 251,
        )
