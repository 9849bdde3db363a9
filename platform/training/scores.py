"""What a trained model scores on a split."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ...recurrences import LanguageModel
from ..tasks import Split
from .device import Hardware


@dataclass(frozen=True)
class Scores:
    """Sums over the scored tokens of a split."""

    loss_sum: float
    correct: int
    tokens: int

    @property
    def loss(self) -> float:
        """Mean cross entropy, nats per scored token."""
        return self.loss_sum / self.tokens

    def measurements(self, split: str, metric: str) -> dict[str, float]:
        """`test/loss`, and `accuracy` or `perplexity` + `bits_per_byte`, whichever the task is measured by."""
        found = {f"{split}/loss": self.loss, f"{split}/accuracy": self.correct / self.tokens}
        if metric == "perplexity":
            found[f"{split}/perplexity"] = math.exp(min(self.loss, 700.0))
            found[f"{split}/bits_per_byte"] = self.loss / math.log(2)
        return found


@torch.no_grad()
def evaluate(model: LanguageModel, split: Split, hardware: Hardware, batch: int, most: int) -> Scores:
    """Score the first `most` rows of a split. The sums are taken in float64, so that they do not depend on the batch size."""
    loss_sum, correct, tokens = 0.0, 0, 0
    rows = min(len(split), most)
    for start in range(0, rows, batch):
        inputs, targets = split.rows(np.arange(start, min(start + batch, rows)))
        with hardware.autocast():
            logits, wanted = model.scored_logits(
                torch.from_numpy(inputs).to(hardware.device), torch.from_numpy(targets).to(hardware.device)
            )
        logits = logits.float()
        loss_sum += F.cross_entropy(logits, wanted, reduction="none").double().sum().item()
        correct += int((logits.argmax(-1) == wanted).sum())
        tokens += wanted.numel()
    return Scores(loss_sum, correct, tokens)
