"""The measurements of a trial: their names, units, and which direction is better."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """A measurement's unit, direction and how a table prints it."""

    unit: str
    higher_is_better: bool | None
    format: str
    help: str


_SCORES = {
    "loss": Measure("nats", False, ".4f", "cross entropy per scored token"),
    "accuracy": Measure("", True, ".4f", "share of scored tokens whose most likely prediction is right"),
    "perplexity": Measure("", False, ".3f", "exp(loss), per token"),
    "bits_per_byte": Measure("bits", False, ".4f", "loss / ln 2, per byte of text"),
}
MEASURES: dict[str, Measure] = {
    **{f"{split}/{name}": measure for split in ("test", "validation") for name, measure in _SCORES.items()},
    "throughput/train_tokens_per_second": Measure(
        "tokens/s", True, ",.0f", "training tokens per second, median over the curve's intervals"
    ),
    "memory/peak_bytes": Measure("bytes", False, ",.0f", "peak memory: of the GPU, or of the worker process on a CPU"),
    "model/parameters": Measure("", None, ",.0f", "number of parameters"),
    "model/state_bytes": Measure("bytes", None, ",.0f", "state carried from token to token, one sequence, at the task's length"),
    "time/train_seconds": Measure("s", None, ".1f", "seconds spent in training steps"),
}


def full_name(name: str) -> str:
    """`accuracy` -> `test/accuracy`, `train_tokens_per_second` -> `throughput/...`; a full name stays as it is."""
    if "/" in name:
        return name
    return next((full for full in MEASURES if full.split("/")[1] == name), name)


def measured(name: str, metric: str) -> bool:
    """Whether a trial whose task's own metric is `metric` has the measurement: perplexity, bits per byte are for text alone."""
    return metric == "perplexity" or name.split("/")[1] not in ("perplexity", "bits_per_byte")
