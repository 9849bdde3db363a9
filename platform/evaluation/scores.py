"""What a trained model scores on a split: as a whole, by position, and by what the task says of its positions.

    scores = evaluate(model, data.test, hardware, batch=16, most=1000)
    scores.whole.measurements("test", "accuracy")                 # {"test/loss": ..., "test/accuracy": ...}
    scores.measurements("test", "accuracy")                       # and per slice: {"test/position_16_31/accuracy": ...}

Rows longer than `piece` tokens are read in pieces, the state carried from one to the next, as the recurrence is meant to be used;
nothing is cut into independent windows, and memory does not grow with the row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ...recurrences import LanguageModel
from ..tasks import Faceted, Split, document_starts
from ..tasks.base import IGNORE
from ..tasks.draws import octave, octaves
from ..training import Hardware

POSITION = "position"
"""The facet of every split: how many tokens were read before the answer, the scored position's own included."""
FEWEST_POSITIONS = 16
"""The first bucket of positions ends before this one."""
_LOGITS = 1 << 24
"""Logits that are computed at once, at most."""

Ints = NDArray[np.int64]


@dataclass
class Tally:
    """Sums over some scored tokens."""

    loss_sum: float = 0.0
    correct: int = 0
    tokens: int = 0
    bytes: int = 0
    """Of text that the scored tokens stand for."""

    @property
    def loss(self) -> float:
        """Mean cross entropy, nats per scored token; NaN without any."""
        return self.loss_sum / self.tokens if self.tokens else math.nan

    def main(self, metric: str) -> float:
        """The task's own metric: accuracy, or perplexity per token."""
        return self.correct / max(self.tokens, 1) if metric == "accuracy" else math.exp(min(self.loss, 700.0))

    def measurements(self, split: str, metric: str) -> dict[str, float]:
        """`test/loss`, `test/accuracy`, and for text `test/perplexity` and `test/bits_per_byte`."""
        found = {f"{split}/loss": self.loss, f"{split}/accuracy": self.main("accuracy")}
        if metric == "perplexity":
            found[f"{split}/perplexity"] = self.main("perplexity")
            found[f"{split}/bits_per_byte"] = self.loss_sum / math.log(2) / max(self.bytes, 1)
        return found


@dataclass
class Scores:
    """The whole split, and its slices (`position_16_31`, `distance_32_63`, ...)."""

    whole: Tally = field(default_factory=Tally)
    slices: dict[str, Tally] = field(default_factory=dict)

    def measurements(self, split: str, metric: str) -> dict[str, float]:
        """Those of the whole, and the task's own metric of every slice that has scored tokens."""
        found = self.whole.measurements(split, metric)
        return found | {f"{split}/{name}/{metric}": tally.main(metric) for name, tally in self.slices.items() if tally.tokens}


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    split: Split,
    hardware: Hardware,
    batch: int,
    most: int,
    token_bytes: Ints | None = None,
    piece: int = 0,
) -> Scores:
    """Score the first `most` rows of a split. The sums are taken in float64, so that they do not depend on the batch size.

    `token_bytes` [vocab]: bytes of text per token, None: one each. `piece`: tokens read at a time, 0: whole rows.
    """
    facets = _facets(split)
    sums = {name: _Sums(len(buckets)) for name, buckets in facets.items()}
    rows = min(len(split), most)
    for start in range(0, rows, batch):
        index = np.arange(start, min(start + batch, rows))
        inputs, targets = split.rows(index)
        asked = targets != IGNORE
        labels = {POSITION: np.broadcast_to(_position(np.arange(split.length)), targets.shape)}
        labels |= split.labels(index) if isinstance(split, Faceted) else {}
        starts = document_starts(split, index)
        # Documents that begin anew carry nothing from piece to piece: their rows are read whole.
        losses, right = _score(
            model, inputs, targets, hardware, split.length if starts is not None or not piece else piece, starts
        )
        size = np.ones(len(losses)) if token_bytes is None else token_bytes[targets[asked]]
        for name, one in sums.items():
            one.add(labels[name][asked], losses, right, size)
    whole = sums[POSITION].tally(slice(None))
    slices = {
        f"{name}_{bucket}": sums[name].tally(slice(i, i + 1))
        for name, buckets in facets.items()
        for i, bucket in enumerate(buckets)
    }
    return Scores(whole, slices)


def positions(length: int) -> tuple[str, ...]:
    """Names of the buckets of positions, counted from 1: "1_15", "16_31", "32_63", ..."""
    return (f"1_{FEWEST_POSITIONS - 1}", *octaves(length)[FEWEST_POSITIONS.bit_length() - 1 :])


def slice_names(split: Split) -> list[str]:
    """The slices that `evaluate` measures on a split."""
    return [f"{name}_{bucket}" for name, buckets in _facets(split).items() for bucket in buckets]


def _facets(split: Split) -> dict[str, tuple[str, ...]]:
    """Facet -> names of its buckets: the position, and what the task has."""
    return {POSITION: positions(split.length), **(split.facets if isinstance(split, Faceted) else {})}


def _position(index: Ints) -> Ints:
    """The bucket of each position, counted from 0."""
    return np.maximum(octave(index + 1) - (FEWEST_POSITIONS.bit_length() - 2), 0)


class _Sums:
    """Loss, right answers, tokens and bytes per bucket, in float64."""

    def __init__(self, buckets: int) -> None:
        self.sums = np.zeros((4, buckets))

    def add(self, label: Ints, losses: NDArray[np.float64], right: NDArray[np.bool_], size: NDArray[np.float64] | Ints) -> None:
        """Scored tokens with their bucket, -1 for none."""
        inside = label >= 0
        for row, values in zip(self.sums, (losses, right, np.ones(len(losses)), size), strict=True):
            row += np.bincount(label[inside], weights=values[inside], minlength=len(row))

    def tally(self, which: slice) -> Tally:
        """The sum over some buckets."""
        loss, right, tokens, size = self.sums[:, which].sum(axis=1)
        return Tally(float(loss), round(right), round(tokens), round(size))


def _score(
    model: LanguageModel,
    inputs: Ints,
    targets: Ints,
    hardware: Hardware,
    piece: int,
    starts: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """(losses, whether the likeliest token is the target) of the scored positions, in the order of `targets`' rows."""
    losses, right = np.zeros(targets.shape), np.zeros(targets.shape, dtype=np.bool_)
    asked = targets != IGNORE
    whole = inputs.shape[1] <= piece
    state = None if whole else model.initial_state(len(inputs))
    for start in range(0, inputs.shape[1], piece):
        part = slice(start, start + piece)
        with hardware.autocast():
            tokens = torch.from_numpy(np.ascontiguousarray(inputs[:, part])).to(hardware.device)
            begins = None if starts is None else torch.from_numpy(starts).to(hardware.device)
            hidden, state = model.hidden(tokens, state or None, begins)
        where = torch.from_numpy(asked[:, part])
        wanted = torch.from_numpy(targets[:, part])[where].to(hardware.device)
        found = [
            (F.cross_entropy(logits, answers, reduction="none").double().cpu(), (logits.argmax(-1) == answers).cpu())
            for logits, answers in _logits(model, hidden[where.to(hardware.device)], wanted, hardware)
        ]
        if found:
            losses[:, part][asked[:, part]] = torch.cat([loss for loss, _ in found]).numpy()
            right[:, part][asked[:, part]] = torch.cat([one for _, one in found]).numpy()
    return losses[asked], right[asked]


def _logits(model: LanguageModel, hidden: Tensor, wanted: Tensor, hardware: Hardware) -> Iterator[tuple[Tensor, Tensor]]:
    """The scored positions' logits in float32 with their targets, a block at a time: a wide vocabulary never stands whole."""
    rows = max(1, _LOGITS // model.vocab)
    for start in range(0, len(wanted), rows):
        with hardware.autocast():
            logits = model.logits(hidden[start : start + rows])
        yield logits.float(), wanted[start : start + rows]
