"""Ray Tune as the executor of frozen trials: it places them, retries dead workers, and hands their reports to the driver.

Tune knows nothing of the grid: every trial is already frozen, and the ledger says which remain. That is what makes a launch
resumable after any kill (Tune's own restore is a pickle of a fixed search space).
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from ...errors import UserError
from ..config import ResourcesConfig
from .stop import Listener, Stop
from .trial import Job, run_trial

OBJECT_STORE_BYTES = 100 * 2**20
"""Trials exchange numbers, not tensors: the smallest store that Ray accepts comfortably."""
EXIT_SECONDS = 15.0
"""How long a launch's end waits for Ray's processes: they are asked to go, and on a busy machine go a moment later."""
ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # Without it cuBLAS is not deterministic, whatever torch is told.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # glibc hands every tensor over 128 KB back to the system and page-faults it in again: an eighth of a small model's step.
    # One arena, since a warm worker runs every trial in a new thread and each would keep an arena of its own (65 MB a trial).
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(4 * 2**30),
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
"""What Ray and its workers are started with, where the environment does not say otherwise."""


@contextmanager
def ray_cluster(resources: ResourcesConfig) -> Iterator[None]:
    """A Ray of our own on this machine, or the cluster at `resources.address`. `UserError` if a trial does not fit."""
    os.environ.update({key: value for key, value in ENVIRONMENT.items() if key not in os.environ})
    import ray

    here = psutil.Process()
    earlier = set(here.children(recursive=True))
    options: dict[str, Any] = {"address": resources.address, "log_to_driver": False, "logging_level": logging.ERROR}
    if resources.address == "local":
        options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
        options["num_cpus"] = _usable_cores()
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"resources.address: cannot reach Ray at {resources.address!r}: {error}") from error
    try:
        _check_fit(resources, ray.cluster_resources())
        yield
    finally:
        # Listed before: with their parent gone, nothing says any more whose they were.
        started = set(here.children(recursive=True)) - earlier
        ray.shutdown()
        _wait_until_gone(started)


def _wait_until_gone(processes: Collection[psutil.Process]) -> None:
    """Return once none of them runs, after `EXIT_SECONDS` at the latest. (`psutil.wait_procs` would also wait for zombies,
    for ever where a container's first process does not collect them.)"""
    deadline = time.monotonic() + EXIT_SECONDS
    while any(_alive(process) for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def check_local_resources(resources: ResourcesConfig) -> None:
    """Before anything is prepared: a trial that asks for more than this machine has would wait forever."""
    if resources.address != "local":
        return
    if resources.cpus_per_trial > _usable_cores():
        cpus = resources.cpus_per_trial
        raise UserError(f"resources.cpus_per_trial: {cpus} is more than the {_usable_cores()} cores of this machine")
    if resources.gpus_per_trial:
        import torch

        wanted, found = resources.gpus_per_trial, torch.cuda.device_count()
        if wanted > found:
            raise UserError(f"resources.gpus_per_trial: {wanted:g}, but PyTorch sees {found} GPUs on this machine")


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check_fit(resources: ResourcesConfig, cluster: dict[str, float]) -> None:
    for field, name, wanted in (
        ("cpus_per_trial", "CPU", float(resources.cpus_per_trial)),
        ("gpus_per_trial", "GPU", resources.gpus_per_trial),
    ):
        if wanted > cluster.get(name, 0.0):
            where = "this machine" if resources.address == "local" else "the cluster"
            raise UserError(f"resources.{field}: {wanted:g}, but {where} has {cluster.get(name, 0.0):g} {name}s")


def execute(jobs: Sequence[Job], resources: ResourcesConfig, folder: Path, listener: Listener, stop: Stop) -> None:
    """Run every job once (again from its checkpoint when its worker dies), telling `listener`. Needs `ray_cluster`.

    folder: for Tune's own files, on storage that all nodes share; removed at the end, as is what a killed launch left there.
    """
    from ray import tune

    from .hooks import Reports, WhenAsked

    shutil.rmtree(folder, ignore_errors=True)
    reports = Reports(listener, {job.hash for job in jobs}, stop)
    gpus = resources.gpus_per_trial
    # One worker process serves trial after trial on a CPU (a fresh one costs seconds of imports); a GPU's memory must come back.
    config = tune.TuneConfig(max_concurrent_trials=resources.trials_at_once or None, reuse_actors=gpus == 0)
    run = tune.RunConfig(
        name=folder.name,
        storage_path=str(folder.parent),
        callbacks=[reports],
        failure_config=tune.FailureConfig(max_failures=resources.retries),
        checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
        stop=WhenAsked(stop, reports),
        verbose=0,
    )
    trainable = tune.with_resources(_trainable, {"cpu": resources.cpus_per_trial, "gpu": gpus})
    space = {"job": tune.grid_search([dataclasses.asdict(job) for job in jobs])}
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    try:
        tune.Tuner(trainable, param_space=space, tune_config=config, run_config=run).fit()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _trainable(config: dict[str, Any]) -> None:
    """What Tune runs in a worker: points as they come, then one last report with the outcome."""
    from ray import tune

    job = Job(**config["job"])
    outcome = run_trial(job, lambda step, points: tune.report({"step": step, "points": points}))
    tune.report({"outcome": dataclasses.asdict(outcome)})
