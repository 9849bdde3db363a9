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
"""Those that every trial has (a text task alone has perplexity and bits per byte)."""
_ASKED = {
    "throughput/prefill_tokens_per_second": Measure("tokens/s", True, ",.0f", "tokens of one sequence read per second"),
    "throughput/decode_tokens_per_second": Measure("tokens/s", True, ",.0f", "tokens decoded per second, all of the batch"),
    "throughput/first_token_seconds": Measure("s", False, ".4f", "until the first token after a prefix"),
    "memory/decode_state_bytes": Measure("bytes", None, ",.0f", "the real state of one sequence after a prefix"),
    "diagnostics/": Measure("", None, ".4f", "what a layer does"),
    "lm_eval/": Measure("", None, ".4f", "a task of lm-eval, with its version: lm_eval/TASK.vVERSION/METRIC"),
}
"""Beginnings of the names that a study's `measure` and `deltalab eval` add."""
GROUPS = (*dict.fromkeys(name.split("/")[0] for name in (*MEASURES, *_ASKED)),)


def measure_of(name: str) -> Measure | None:
    """What a full name means. Slices of the test split have names between: `test/length_2x/position_64_127/accuracy`."""
    if name in MEASURES:
        return MEASURES[name]
    first, *between = name.split("/")
    last = between.pop() if between else ""
    if first == "test" and 1 <= len(between) <= 2 and last in _SCORES:
        measure = _SCORES[last]
        return Measure(measure.unit, measure.higher_is_better, measure.format, f"{measure.help}; {' '.join(between)}")
    return next((measure for start, measure in _ASKED.items() if name.startswith(start)), None)


def full_name(name: str) -> str:
    """`accuracy` -> `test/accuracy`, `length_2x/accuracy` -> `test/length_2x/accuracy`, `train_tokens_per_second` ->
    `throughput/...`; a full name stays as it is."""
    if "/" in name:
        return name if name.split("/")[0] in GROUPS else f"test/{name}"
    return next((full for full in MEASURES if full.split("/")[1] == name), name)


def measured(name: str, metric: str) -> bool:
    """Whether a trial whose task's own metric is `metric` has the measurement: perplexity, bits per byte are for text alone.

    Of a slice only the task's own metric is kept.
    """
    first, *between, last = name.split("/")
    if first == "test" and len(between) == 1:
        return last == metric or last in ("loss", "accuracy") or metric == "perplexity"
    if between:
        return last == metric
    return metric == "perplexity" or last not in ("perplexity", "bits_per_byte")
