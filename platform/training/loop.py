"""The training loop of one trial: deterministic in its seed, resumable at any step, and honest about divergence."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...recurrences import LanguageModel
from ..config import TrainingConfig
from ..tasks import Split, document_starts
from .checkpoint import load_checkpoint, save_checkpoint, set_aside
from .device import Hardware
from .order import Order

Report = Callable[[int, dict[str, float]], None]
CHECKPOINT_SHARE = 20
"""A checkpoint that takes s seconds is written at most every 20 s seconds: never more than 5 % of the time."""


class Diverged(Exception):  # noqa: N818
    """Loss or gradient stopped being finite. A result, not a fault: the trial is recorded as `diverged` and not retried."""


class Interrupted(Exception):  # noqa: N818
    """The launch was asked to stop; the checkpoint holds everything up to the last step."""


class Trainer:
    """Trains `model` on `split` for `config.steps` steps.

    The order of the data depends on `seed` and the step alone, so it is the same in every arm (differences are paired) and after
    every resume. State that a resume needs: parameters, optimiser, step, the curve's last values and the clock.

    `identity` names the trial in its checkpoint `file`: one of another trial, or of code with other parameters, is set aside.
    """

    def __init__(
        self,
        model: LanguageModel,
        split: Split,
        config: TrainingConfig,
        seed: int,
        hardware: Hardware,
        file: Path,
        identity: str = "",
    ) -> None:
        self.model, self.split, self.config, self.seed, self.hardware, self.file = model, split, config, seed, hardware, file
        self.identity = identity
        decayed, kept = model.decay_groups()
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=True)
        self.parameters = decayed + kept
        self.step = 0
        self.curve: list[tuple[int, dict[str, float]]] = []
        """Every report so far, so that a launch that resumes can write down what the killed one could not."""
        self.rates: list[float] = []
        """Training tokens per second of every interval between two reports."""
        self.seconds = 0.0
        # Sums over the steps since the last report; part of the checkpoint, so that a resume reports the same means.
        self._sums = torch.zeros(2, dtype=torch.float64, device=hardware.device)
        self._since = 0
        self._order = Order(split, config.batch, seed, config.steps)
        self._tokens = 0
        """Trained on since the clock was last read."""
        self.warning = self._resume()
        self._saved_at, self._save_cost = time.monotonic(), 0.0

    def run(self, report: Report, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Train to the end, reporting `train/loss`, `train/lr` and `train/grad_norm` every `log_every` steps.

        Raises `Diverged`, and `Interrupted` (after saving) when `should_stop()` says so between two steps.
        """
        config = self.config
        self.model.train()
        started, first = self._clock(), self.step
        while self.step < config.steps:
            if should_stop():
                self._count_time(self._clock() - started, self.step - first)
                self.save()
                raise Interrupted
            rate = learning_rate(config, self.step)
            self._sums += torch.stack(self._one_step(rate))
            self.step += 1
            if self.step % config.log_every == 0 or self.step == config.steps:
                self._count_time(self._clock() - started, self.step - first)
                self._report(report, rate)
                started, first = self._clock(), self.step
        self.save()

    def _report(self, report: Report, rate: float) -> None:
        loss, norm = (self._sums / (self.step - self._since)).tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Diverged(f"loss {loss:g}, gradient norm {norm:g} between steps {self._since + 1} and {self.step}")
        self._sums.zero_()
        self._since = self.step
        values = {"train/loss": loss, "train/grad_norm": norm, "train/lr": rate}
        self.curve.append((self.step, values))
        report(self.step, values)
        if time.monotonic() - self._saved_at >= max(self.config.checkpoint_seconds, CHECKPOINT_SHARE * self._save_cost):
            self.save()

    def _one_step(self, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self._order.rows(self.step)
        inputs, targets = self.split.rows(rows)
        self._tokens += inputs.size
        device = self.hardware.device
        begins = document_starts(self.split, rows)
        starts = None if begins is None else torch.from_numpy(begins).to(device)
        with self.hardware.autocast():
            loss = self.model.loss(torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device), starts)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip or math.inf)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return loss.detach(), norm.detach()

    def _clock(self) -> float:
        self.hardware.synchronise()
        return time.perf_counter()

    def _count_time(self, seconds: float, steps: int) -> None:
        if not steps:
            return
        self.seconds += seconds
        self.rates.append(self._tokens / max(seconds, 1e-9))
        self._tokens = 0

    @property
    def tokens_per_second(self) -> float:
        """Median over the intervals; the first one warms caches and allocators up and counts only where it is alone."""
        return statistics.median(self.rates[1:] or self.rates) if self.rates else 0.0

    def save(self) -> None:
        """Write the checkpoint."""
        began = time.monotonic()
        save_checkpoint(
            self.file,
            {
                "model": self.model.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "step": self.step,
                "rates": self.rates,
                "seconds": self.seconds,
                "curve": self.curve,
                "sums": self._sums,
                "since": self._since,
                "identity": self.identity,
                "warning": self.warning,
            },
        )
        self._saved_at = time.monotonic()
        self._save_cost = self._saved_at - began

    def _resume(self) -> str:
        """Continue from the checkpoint, if there is a whole one; returns what the user should know of a damaged one."""
        content, warning = load_checkpoint(self.file, self.hardware.device)
        if content is None:
            return warning
        if not self._fits(content):
            return set_aside(self.file, "belongs to another trial, or to another version of the model")
        self.model.load_state_dict(content["model"])
        self.optimiser.load_state_dict(content["optimiser"])
        self.step, self.rates, self.seconds = content["step"], content["rates"], content["seconds"]
        self.curve, self._sums, self._since = content["curve"], content["sums"], content["since"]
        return str(content["warning"])

    def _fits(self, content: dict[str, Any]) -> bool:
        """Whether a checkpoint is this trial's; looked at as a whole before anything of it is taken over."""
        if content.keys() != _FIELDS or content["identity"] != self.identity or not 0 <= content["step"] <= self.config.steps:
            return False
        moments = {index: state["exp_avg"].shape for index, state in content["optimiser"]["state"].items()}
        own = dict(enumerate(parameter.shape for parameter in self.parameters))
        same = all(own.get(index) == shape for index, shape in moments.items())
        return same and _shapes(content["model"]) == _shapes(self.model.state_dict())


_FIELDS = {"model", "optimiser", "step", "rates", "seconds", "curve", "sums", "since", "identity", "warning"}


def _shapes(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Linear warm-up over `warmup * steps` steps, then a cosine from `lr` down to `final_lr * lr` at the last step."""
    warm = round(config.warmup * config.steps)
    if step < warm:
        return config.lr * (step + 1) / warm
    progress = (step - warm) / max(config.steps - warm - 1, 1)
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
