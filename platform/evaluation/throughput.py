"""What a language model costs to run: prefill, the first token, and decoding with its real state.

    measure_throughput(model, ThroughputConfig(contexts=(1024,), batches=(1, 16)), hardware)
    # {"throughput/prefill_tokens_per_second_1024": ..., "throughput/first_token_seconds_1024": ...,
    #  "throughput/decode_tokens_per_second_ctx1024_batch16": ..., "memory/decode_state_bytes_1024": ...}

A prefix is read once, in pieces between which the state is carried, so that memory stays bounded; from its state single tokens
are decoded, one call each. The prefix is never read again for a token. A batch decodes copies of one prefix.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ...recurrences import LanguageModel, MixerState
from ...recurrences.language_model import LanguageModelState
from ...strict import option
from ..training import Hardware

T = TypeVar("T")
COPIES = 3
"""States of a decoding batch that live at a time: the one it starts from, the one before a token and the one after it."""

_WARM_UP = 512


@dataclass(frozen=True)
class ThroughputConfig:
    """What is timed, how often, and what it may take."""

    contexts: tuple[int, ...] = option((1024, 4096), "tokens that are read before the ones that are decoded", min=1, max=2**24)
    batches: tuple[int, ...] = option((1, 16), "sequences that are decoded side by side", min=1, max=2**16)
    repeats: int = option(5, "timings of every number, of which the median counts", min=1, max=10_000)
    decode_tokens: int = option(16, "tokens that one timing decodes", min=1, max=2**16)
    piece: int = option(1024, "tokens that a prefill reads at a time, which bounds its memory", min=1, max=2**20)
    seconds: float = option(30.0, "time for one number; one that would take longer is left out", above=0)
    memory_gb: float = option(2.0, "memory for the states of a batch; one that would take more is left out", above=0)


class OverBudget(Exception):  # noqa: N818
    """A number that would take more time or memory than it may."""


@dataclass(frozen=True)
class Prefill:
    """Seconds until the state of the prefix stood, and until the first new token was chosen."""

    seconds: float
    first_token: float


class Reader:
    """One model, timed at one context after another: `prefill` reads a prefix and keeps its state, `decode` goes on from it.

    In bf16 the weights are cast once, as a model is served; the states follow `LanguageModel.state_bytes` in either precision.
    """

    def __init__(self, model: LanguageModel, hardware: Hardware, piece: int = 1024, seed: int = 0) -> None:
        self.model = copy.deepcopy(model).bfloat16() if hardware.precision == "bf16" else model
        self.hardware, self.piece = hardware, piece
        self._generator = torch.Generator().manual_seed(seed)
        self._prefix: tuple[LanguageModelState, Tensor] | None = None
        self._batch: tuple[LanguageModelState, Tensor] | None = None

    @torch.inference_mode()
    def prefill(self, context: int, seconds: float = float("inf")) -> Prefill:
        """Read `context` random tokens of one sequence. `OverBudget` as soon as more than `seconds` are foreseen."""
        tokens = torch.randint(self.model.vocab, (1, context), generator=self._generator).to(self.hardware.device)
        self._prefix = self._batch = None
        pieces = -(-context // self.piece)
        start = self._clock()
        state, hidden = self.model.initial_state(1), torch.empty(0)
        for number in range(pieces):
            hidden, state = self.model.hidden(tokens[:, number * self.piece : (number + 1) * self.piece], state)
            foreseen = (self._clock() - start) * pieces / (number + 1)
            if foreseen > seconds and number + 1 < pieces:
                raise OverBudget(f"a prefill of {context:,} tokens takes {foreseen:.0f} s or more, over {seconds:g} s")
        middle = self._clock()
        token = self.model.logits(hidden[:, -1:]).argmax(-1)
        end = self._clock()
        self._prefix = state, token
        return Prefill(middle - start, end - start)

    @torch.inference_mode()
    def spread(self, batch: int) -> None:
        """Give `decode` a batch: every sequence its own copy of the prefix' state."""
        assert self._prefix is not None, "prefill first"
        state, token = self._prefix
        self._batch = None  # before the next one is made
        self._batch = [_copies(layer, batch) for layer in state], token.expand(batch, 1).contiguous()

    @torch.inference_mode()
    def decode(self, tokens: int, seconds: float = float("inf")) -> float:
        """Seconds for `tokens` single-token steps of the batch, each fed with what the one before chose. `OverBudget` as soon as
        more than `seconds` are foreseen."""
        assert self._batch is not None, "spread first"
        state, token = self._batch
        start = self._clock()
        for number in range(tokens):
            logits, state = self.model(token, state)
            token = logits[:, -1:].argmax(-1)
            if number == 0 and (foreseen := (self._clock() - start) * tokens) > seconds:
                raise OverBudget(f"decoding {tokens} tokens of {len(token)} sequences takes {foreseen:.0f} s, over {seconds:g} s")
        return self._clock() - start

    def warm_up(self, batches: Iterable[int], memory: float) -> None:
        """Let everything be compiled that a prefix and a token of these batches run, before a budget counts: many sequences take
        another loop than a few. Those whose states would take more than `memory` bytes are left out."""
        self.prefill(_WARM_UP)
        for batch in batches:
            if self.needs(_WARM_UP, batch) <= memory:
                self.spread(batch)
                self.decode(1)
        self.forget()

    def state_bytes(self) -> int:
        """Bytes of the real state of one sequence, after its prefix."""
        assert self._prefix is not None, "prefill first"
        return sum(layer.state_bytes for layer in self._prefix[0])

    def cache_bytes(self) -> int:
        """The part of it that a token only reads and adds to: attention's keys and values. The rest is read and written."""
        assert self._prefix is not None, "prefill first"
        caches = (tensor for layer in self._prefix[0] for tensor in (layer.keys, layer.values) if tensor is not None)
        return sum(tensor.numel() * tensor.element_size() for tensor in caches)

    def needs(self, context: int, batch: int) -> int:
        """Bytes that decoding a batch takes for its states, by formula."""
        return COPIES * batch * self.model.state_bytes(context)

    def forget(self) -> None:
        """Let go of the states."""
        self._prefix = self._batch = None

    def _clock(self) -> float:
        self.hardware.synchronise()
        return time.perf_counter()


def measure_throughput(model: LanguageModel, config: ThroughputConfig, hardware: Hardware) -> dict[str, float]:
    """The numbers of one model by name; a number that would be over its budget of time or memory is not among them.

    Prefill and first token are of one sequence. The model's mode and parameters are left as they were.
    """
    found: dict[str, float] = {}
    with _evaluating(model):
        reader = Reader(model, hardware, config.piece)
        reader.warm_up(config.batches, config.memory_gb * 1e9)
        for context in sorted(set(config.contexts)):
            try:
                found |= _at(reader, context, config)
            except OverBudget:
                break  # and so would every longer one
    return found


def _at(reader: Reader, context: int, config: ThroughputConfig) -> dict[str, float]:
    prefills = _repeated(lambda: reader.prefill(context, config.seconds), config)
    found = {
        f"throughput/prefill_tokens_per_second_{context}": context / statistics.median(p.seconds for p in prefills),
        f"throughput/first_token_seconds_{context}": statistics.median(p.first_token for p in prefills),
        f"memory/decode_state_bytes_{context}": float(reader.state_bytes()),
    }
    for batch in sorted(set(config.batches)):
        if reader.needs(context, batch) > config.memory_gb * 1e9:
            break
        reader.spread(batch)
        try:
            times = _repeated(lambda: reader.decode(config.decode_tokens, config.seconds), config)
        except OverBudget:
            break
        rate = batch * config.decode_tokens / statistics.median(times)
        found[f"throughput/decode_tokens_per_second_ctx{context}_batch{batch}"] = rate
    return found


def _repeated(run: Callable[[], T], config: ThroughputConfig) -> list[T]:
    """Results of `repeats` runs after one that warms up; of fewer, but one, where they would take more than the budget."""
    start = time.perf_counter()
    run()
    took = time.perf_counter() - start
    found: list[T] = []
    while len(found) < config.repeats and (not found or time.perf_counter() - start + took <= config.seconds):
        found.append(run())
    return found


@contextmanager
def _evaluating(model: LanguageModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _copies(state: MixerState, batch: int) -> MixerState:
    """The state of one sequence for each of `batch`, in memory of their own."""
    return state.map(lambda tensor: tensor.repeat(batch, *[1] * (tensor.ndim - 1)))
