"""One trial from its frozen config to its measurements: what a worker runs. It knows no ledger and no MLflow."""

from __future__ import annotations

import json
import math
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from ... import plugins
from ...recurrences import spec_from_mapping
from ...registry import check_origins
from ...strict import build
from ..config import MeasureConfig, ModelConfig, TrainingConfig
from ..evaluation import inspect, score
from ..study import build_model
from ..tasks import PreparedTask, prepare_task
from ..tasks.registry import frozen_task
from ..training import Diverged, Interrupted, PeakMemory, Trainer, WrongKernel, pass_gate, prepare_device

Points = list[tuple[str, int, float]]
"""(name, step, value): what crosses from a worker to the driver."""
Curve = list[tuple[int, dict[str, float]]]
"""(step, name -> value): what a trial keeps."""
LOCK_POLL_SECONDS = 1.0
"""A trial's folder may be held by a worker of a killed launch, or by another study with the same trial: it is waited for."""


@dataclass(frozen=True)
class Job:
    """What a worker is sent: plain data only. `folder` and `cache` lie on storage that all nodes share."""

    hash: str
    config: dict[str, Any]
    folder: str
    cache: str
    stop_file: str
    threads: int
    gpus: float = 0.0
    imports: Sequence[Sequence[str]] = ()
    """Plug-in modules and where they were found (`plugins.imports()`): a worker has neither our folder nor our options."""


@dataclass
class Outcome:
    """How a trial ended: finished | failed | diverged | interrupted."""

    status: Literal["finished", "failed", "diverged", "interrupted"]
    measurements: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    context: dict[str, str] = field(default_factory=dict)
    """Backend, device and precision that it ran with, the gate's verdict, and warnings."""
    files: list[str] = field(default_factory=list)
    """What MLflow should keep of the trial's folder."""


def run_trial(job: Job, report: Callable[[int, Points], None]) -> Outcome:
    """Train, evaluate, keep the result; every way to end except a kill is an Outcome. A finished trial is read, not run again."""
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if os.path.exists(job.stop_file):
            raise Interrupted
        with _alone(folder, job.stop_file):
            outcome = _read_result(folder, report) or _run(job, folder, report)
    except Interrupted:
        return Outcome("interrupted")
    except WrongKernel as wrong:
        return Outcome("failed", error=str(wrong))
    except Exception:
        return Outcome("failed", error=traceback.format_exc(limit=-8))
    return outcome


@contextmanager
def _alone(folder: Path, stop_file: str) -> Iterator[None]:
    """Hold the trial's folder; the lock goes with its process. Raises `Interrupted` when asked to stop while waiting."""
    lock = FileLock(folder / "lock")
    while True:
        try:
            lock.acquire(timeout=LOCK_POLL_SECONDS)
            break
        except Timeout:
            if os.path.exists(stop_file):
                raise Interrupted from None
    try:
        yield
    finally:
        lock.release()


def _run(job: Job, folder: Path, report: Callable[[int, Points], None]) -> Outcome:
    plugins.adopt(job.imports)
    data, task_metric = _data(job)
    training = build(TrainingConfig, job.config["training"], "training")
    model_config = build(ModelConfig, job.config["model"], "model")
    hardware = prepare_device(job.threads, training.precision, model_config.width, job.gpus > 0)
    seed = job.config["seed"]
    spec = spec_from_mapping(job.config["recurrence"])
    check_origins(spec, job.config.get("plugins", {}))
    sizes, cache = (model_config.width, model_config.heads), Path(job.cache)
    verified = pass_gate(spec, *sizes, training.backend, hardware.device, cache, hardware.precision)
    memory = PeakMemory(hardware.device)
    model = build_model(spec, model_config, data.vocab, training.backend, seed).to(hardware.device)
    trainer = Trainer(model, data.train, training, seed, hardware, folder / "checkpoint.pt", job.hash)
    with hardware.autocast():
        backend = model.backend(hardware.device)
    context = {
        "backend": backend,
        "device": hardware.device.type,
        "precision": hardware.precision,
        "verified": verified,
        "warning": trainer.warning,
    }
    _report_curve(trainer.curve, report)
    scores: dict[str, float] = {}
    found: dict[str, float] = {}
    files: list[Path] = []
    peak, error = 0, None
    try:
        trainer.run(
            lambda step, values: _report_curve([(step, values)], report),
            should_stop=lambda: os.path.exists(job.stop_file),
        )
        model.eval()
        scores = score(model, data, task_metric, training, hardware)
        if not math.isfinite(scores["test/loss"]):
            raise Diverged(f"test loss {scores['test/loss']:g} after the last step")
        peak = memory.bytes()  # of training and scoring: what the study asks for besides may take more
        found, files = inspect(model, data, build(MeasureConfig, job.config.get("measure", {}), "measure"), hardware, folder)
    except Diverged as diverged:
        scores, error = {}, str(diverged)
    measurements = {
        "throughput/train_tokens_per_second": trainer.tokens_per_second,
        "time/train_seconds": trainer.seconds,
        "memory/peak_bytes": float(peak or memory.bytes()),
        "model/parameters": float(model.parameter_count()),
        "model/state_bytes": float(model.state_bytes(data.length)),
    }
    status: Literal["finished", "diverged"] = "diverged" if error else "finished"
    outcome = Outcome(status, measurements | scores | found, error, context, [str(file) for file in files])
    _write_result(folder, outcome, trainer.curve)
    return outcome


def _report_curve(curve: Curve, report: Callable[[int, Points], None]) -> None:
    """Hand several steps over at once: what a resumed trial repeats costs one message, however long it is."""
    if curve:
        report(curve[-1][0], [(name, step, value) for step, values in curve for name, value in values.items()])


def _data(job: Job) -> tuple[PreparedTask, str]:
    """The task's data, checked to be those that the plan has hashed."""
    digest, version = job.config["task"]["digest"], job.config["task"]["version"]
    task = frozen_task(job.config)
    data = prepare_task(task, Path(job.cache))
    if (data.digest, data.version) != (digest, version):
        found = f"{data.digest} v{data.version}"
        raise RuntimeError(f"the data of {task.name} changed under the launch: planned {digest} v{version}, found {found}")
    return data, task.metric


def _write_result(folder: Path, outcome: Outcome, curve: Curve) -> None:
    """Keep the outcome beside the checkpoint: a driver that dies before it has recorded it finds it here."""
    content = {**asdict(outcome), "curve": curve}
    temporary = folder / f".result.{os.getpid()}"
    temporary.write_text(json.dumps(content))
    temporary.replace(folder / "result.json")


def _read_result(folder: Path, report: Callable[[int, Points], None]) -> Outcome | None:
    try:
        content: Mapping[str, Any] = json.loads((folder / "result.json").read_text())
        held = content["status"], dict(content["measurements"]), content["error"], dict(content["context"])
        outcome = Outcome(*held, files=list(content["files"]))
        curve = [(int(step), dict(values)) for step, values in content["curve"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    _report_curve(curve, report)
    return outcome
