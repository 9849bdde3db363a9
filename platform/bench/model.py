"""`deltalab bench model`: what whole language models cost, card beside card: training, prefill, first token, decoding.

Every round times each card once, in an order that rotates, so that what else happens on the machine meets all of them. Times are
medians with their quartiles. A number that would take too long or too much memory says so instead.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F

from ...recurrences import LanguageModel
from ..evaluation.throughput import OverBudget, Reader, ThroughputConfig
from ..training import Hardware, PeakMemory
from .machine import give_back_memory, resident_bytes

Kind = Literal["training", "prefill", "decode"]
Progress = Callable[[str, int, int], None]
"""(what is being timed, timings done, timings at most)."""
_BACKWARD = 2
"""Operations of a backward pass over those of its forward pass, by the usual count."""
_WARM_UP = 2, 512
"""Batch and length of a step that is there for compilation."""
_KEPT = 40
"""Numbers a token, layer and channel that a training step keeps, roughly: to refuse what cannot fit."""


@dataclass
class Cell:
    """One card at one size.

    seconds: of every timing, over `tokens` tokens; first_token: of a prefill, to the first new token.
    flops: a token's, by formula. moved: bytes that one decoding step must read and write. peak: bytes beyond the parameters.
    state, formula: bytes of one sequence's real state, and what `state_bytes` says.
    """

    card: str
    kind: Kind
    context: int
    batch: int
    tokens: int
    flops: int
    seconds: list[float] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    peak: int = 0
    state: int = 0
    formula: int = 0
    moved: int = 0
    failure: str = ""

    @property
    def rate(self) -> float:
        """Tokens a second, median; NaN without a timing."""
        return self.tokens / statistics.median(self.seconds) if self.seconds else float("nan")

    @property
    def spread(self) -> float:
        """(upper - lower quartile) / median; of fewer than four timings, their whole range."""
        if len(self.seconds) < 2:
            return float("nan")
        middle = statistics.median(self.seconds)
        if len(self.seconds) < 4:
            return (max(self.seconds) - min(self.seconds)) / middle
        lower, _, upper = statistics.quantiles(self.seconds, n=4)
        return (upper - lower) / middle

    def record(self) -> dict[str, Any]:
        """As JSON-able data."""
        rate, spread = self.rate, self.spread
        known = {"tokens_per_second": rate, "spread": spread}
        return {**asdict(self), **{name: None if value != value else value for name, value in known.items()}}


@dataclass(frozen=True)
class Sizes:
    """What is timed: training at every (batch, length), reading and decoding as `ThroughputConfig` says."""

    training: tuple[tuple[int, int], ...]
    reading: ThroughputConfig


@dataclass
class _Run:
    """A cell and how it is timed: `time` returns seconds, and may raise `OverBudget`."""

    cell: Cell
    time: Callable[[], float]
    spent: float = 0.0
    last: float = 0.0


class ModelBench:
    """Times `models` by `sizes`; `cells` holds what there is so far, also when a Ctrl-C ends `run`."""

    def __init__(
        self,
        models: Mapping[str, LanguageModel],
        sizes: Sizes,
        hardware: Hardware,
        progress: Progress = lambda *_: None,
    ) -> None:
        self.models, self.sizes, self.hardware, self.progress = models, sizes, hardware, progress
        self.cells: list[Cell] = []
        reading = sizes.reading
        groups = len(sizes.training) + len(reading.contexts) * (1 + len(reading.batches))
        self._all = groups * len(models) * (reading.repeats + 1)
        self._done = 0

    def run(self) -> list[Cell]:
        """Every cell, in order. What has to be compiled is compiled before anything is timed."""
        readers = {card: Reader(model, self.hardware, self.sizes.reading.piece) for card, model in self.models.items()}
        self._compile(readers)
        for batch, length in self.sizes.training:
            self._train(batch, length)
        for context in self.sizes.reading.contexts:
            self._read(readers, context)
        return self.cells

    def _compile(self, readers: Mapping[str, Reader]) -> None:
        for card, reader in readers.items():
            self.progress(f"{card}: compiling", 0, self._all)
            reader.warm_up(self.sizes.reading.batches, self._memory)
            TrainingStep(self.models[card], self.hardware, *_WARM_UP)()

    def _train(self, batch: int, length: int) -> None:
        runs = []
        for card, model in self.models.items():
            flops = (1 + _BACKWARD) * model.flops_per_token(length // 2)
            cell = self._cell(Cell(card, "training", length, batch, batch * length, flops))
            needed = batch * length * 4 * (_KEPT * model.width * len(model.blocks) + 4 * model.vocab)
            if needed > self._memory:
                cell.failure = f"{batch} x {length:,} tokens take about {needed / 1e9:.1f} GB, over {self._memory / 1e9:.1f} GB"
                continue
            runs.append(_Run(cell, TrainingStep(model, self.hardware, batch, length)))
        self._interleave(f"training {batch} x {length}", runs)
        for model in self.models.values():
            model.zero_grad(set_to_none=True)

    def _read(self, readers: Mapping[str, Reader], context: int) -> None:
        """Prefill and decoding at one context. Whoever could not read a shorter one is not asked for this one."""
        gone = {cell.card: cell.failure for cell in self.cells if cell.kind == "prefill" and cell.failure}
        runs = []
        for card, reader in readers.items():
            cell = Cell(card, "prefill", context, 1, context, reader.model.flops_per_token(context // 2))
            self._cell(cell).failure = gone.get(card, "")
            if not cell.failure:
                runs.append(_Run(cell, self._prefill(reader, cell)))
        self._interleave(f"prefill of {context:,}", runs)
        going = {}
        for run in runs:
            reader = readers[run.cell.card]
            if not run.cell.failure:
                run.cell.state, run.cell.formula = reader.state_bytes(), reader.model.state_bytes(context)
                going[run.cell.card] = reader
        for batch in self.sizes.reading.batches:
            self._decode(going, context, batch)
        for reader in readers.values():
            reader.forget()

    def _prefill(self, reader: Reader, cell: Cell) -> Callable[[], float]:
        def run() -> float:
            found = reader.prefill(cell.context, self.sizes.reading.seconds)
            cell.first_token.append(found.first_token)
            return found.seconds

        return run

    def _decode(self, readers: Mapping[str, Reader], context: int, batch: int) -> None:
        """All cards at one batch; into the memory that there may be, the smallest states first."""
        config, runs, room = self.sizes.reading, [], self._memory
        fitting = set()
        for card, reader in sorted(readers.items(), key=lambda item: item[1].needs(context, batch)):
            room -= reader.needs(context, batch)
            if room >= 0:
                fitting.add(card)
        for card, reader in readers.items():
            model = reader.model
            cell = self._cell(Cell(card, "decode", context, batch, batch * config.decode_tokens, model.flops_per_token(context)))
            if card not in fitting:
                needed = reader.needs(context, batch) / 1e9
                cell.failure = f"the states of {batch} sequences of {context:,} tokens take {needed:.1f} GB"
                continue
            cell.moved = _weights(model) + batch * (2 * reader.state_bytes() - reader.cache_bytes())
            runs.append(_Run(cell, _decoding(reader, batch, config)))
        self._interleave(f"decoding {batch} x 1 after {context:,}", runs)

    @property
    def _memory(self) -> float:
        return self.sizes.reading.memory_gb * 1e9

    def _cell(self, cell: Cell) -> Cell:
        self.cells.append(cell)
        return cell

    def _interleave(self, words: str, runs: Sequence[_Run]) -> None:
        """Warm each up, measuring its memory; then rounds in a rotating order while a cell's time lasts."""
        config = self.sizes.reading
        for run in runs:
            self._tick(f"{words}: {run.cell.card}, warm-up")
            with self._measured(run):
                run.spent = run.last = run.time()
            run.cell.first_token.clear()
        for repeat in range(config.repeats):
            turn = repeat % max(len(runs), 1)
            for run in itertools.chain(runs[turn:], runs[:turn]):
                self._tick(f"{words}: {run.cell.card}, round {repeat + 1} of {config.repeats}")
                if run.cell.failure or (run.cell.seconds and run.spent + run.last > config.seconds):
                    continue
                with self._failing(run.cell):
                    run.last = run.time()
                    run.cell.seconds.append(run.last)
                    run.spent += run.last

    def _tick(self, words: str) -> None:
        self.progress(words, self._done, self._all)
        self._done += 1

    @contextmanager
    def _measured(self, run: _Run) -> Iterator[None]:
        """Peak memory beyond what was in use before."""
        device = self.hardware.device
        give_back_memory(device)
        before, memory = resident_bytes(device), PeakMemory(device)
        with self._failing(run.cell):
            yield
        run.cell.peak = max(memory.bytes() - before, 0)

    @contextmanager
    def _failing(self, cell: Cell) -> Iterator[None]:
        """A card that cannot be timed says why, and the others go on."""
        try:
            yield
        except OverBudget as over:
            cell.failure = str(over)
        except (RuntimeError, MemoryError) as error:  # torch has no class of its own for a CPU that is out of memory
            first = (str(error).splitlines() or [""])[0]
            cell.failure = f"{type(error).__name__}: {first}"


class TrainingStep:
    """A call is one step of the trainer on random tokens, every position scored: forward, backward, clipping, AdamW. Returns its
    seconds. The learning rate is tiny: a benchmark must not drift into infinities."""

    def __init__(self, model: LanguageModel, hardware: Hardware, batch: int, length: int) -> None:
        self.model, self.hardware = model, hardware
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(model.vocab, (batch, length + 1), generator=generator).to(hardware.device)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.AdamW(self.parameters, lr=1e-6, fused=True)

    def __call__(self) -> float:
        self.hardware.synchronise()
        start = time.perf_counter()
        with self.hardware.autocast():
            logits, wanted = self.model.scored_logits(self.tokens[:, :-1], self.tokens[:, 1:])
        loss = F.cross_entropy(logits.float(), wanted)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.hardware.synchronise()
        return time.perf_counter() - start


def _weights(model: LanguageModel) -> int:
    """Bytes of the parameters that a step reads: all but an embedding that is no head as well, of which it reads some rows."""
    read = (p for p in model.parameters() if model.head is None or p is not model.embedding.weight)
    return sum(p.numel() * p.element_size() for p in read)


def _decoding(reader: Reader, batch: int, config: ThroughputConfig) -> Callable[[], float]:
    made = False

    def run() -> float:
        nonlocal made
        if not made:
            reader.spread(batch)
            made = True
        return reader.decode(config.decode_tokens, config.seconds)

    return run
