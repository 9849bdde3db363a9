"""Everything that is measured of a trained model, as one trial reports it."""

from __future__ import annotations

import json
from pathlib import Path

from ...recurrences import LanguageModel
from ...strict import build
from ..config import MeasureConfig, TrainingConfig
from ..tasks import PreparedTask
from ..training import Hardware
from .diagnostics import diagnose
from .scores import evaluate
from .throughput import ThroughputConfig, measure_throughput


def score(
    model: LanguageModel, data: PreparedTask, metric: str, training: TrainingConfig, hardware: Hardware
) -> dict[str, float]:
    """`validation/...` of the whole split; `test/...` and `test/<probe>/...` with their slices.

    Rows longer than those that were trained on are read in pieces of that length.
    """

    def of(split: str) -> dict[str, float]:
        rows = {"validation": data.validation, "test": data.test, **data.probes}[split]
        found = evaluate(
            model, rows, hardware, training.batch, training.eval_examples, token_bytes=data.token_bytes, piece=data.length
        )
        if split == "validation":
            return found.whole.measurements(split, metric)
        return found.measurements(split if split == "test" else f"test/{split}", metric)

    return {name: value for split in ("validation", "test", *data.probes) for name, value in of(split).items()}


def inspect(
    model: LanguageModel, data: PreparedTask, config: MeasureConfig, hardware: Hardware, folder: Path
) -> tuple[dict[str, float], list[Path]]:
    """What the study asks for beside scores: (measurements, files in `folder` that MLflow should keep)."""
    found: dict[str, float] = {}
    files = []
    if config.diagnostics:
        found, report = diagnose(model, data.test, hardware)
        file = folder / "diagnostics.json"
        file.write_text(json.dumps(report))
        files.append(file)
    if config.throughput:
        found |= measure_throughput(model, build(ThroughputConfig, config.throughput, "measure.throughput"), hardware)
    return found, files
