"""Kernels made ready by the driver: compiled and held against the definition once, before workers would do it side by side.

Ray hides what a worker prints, and every worker would compile the same loops; here the user sees what is waited for. Workers of
other nodes, and of GPUs, pass the gate by themselves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from ...recurrences import MixerSpec, RecurrenceSpec, layers_of, spec_from_mapping
from ..training import pass_gate
from .display import spinner
from .trial import Job


def prepare_kernels(jobs: Sequence[Job], console: Console, stopped: Callable[[], bool]) -> None:
    """Pass the gate for the jobs' recurrences on this machine's CPU, one of each kind: those that differ in a number alone run
    the same loops, and their workers pass it in a tenth of a second each.

    Whatever is wrong here is wrong in the worker too, whose trial then fails with the message.
    """
    kinds: dict[tuple[object, ...], tuple[Job, MixerSpec]] = {}
    for job in jobs:
        spec = spec_from_mapping(job.config["recurrence"])
        kinds.setdefault(_kind(job.config, spec), (job, spec))
    if not kinds:
        return
    with spinner(console, "checking kernels ...") as status:
        for number, (job, spec) in enumerate(kinds.values(), start=1):
            if stopped():
                return
            if status is not None:
                status.update(f"checking kernels: {escape(spec.name)} ({number} of {len(kinds)}) ...")
            model, backend = job.config["model"], job.config["training"]["backend"]
            with contextlib.suppress(Exception):
                pass_gate(spec, model["width"], model["heads"], backend, torch.device("cpu"), Path(job.cache))


def _kind(config: dict[str, Any], spec: MixerSpec) -> tuple[object, ...]:
    """The components of every layer, without their settings, and the sizes."""
    layers = tuple(
        (*(choice.name for choice in layer.choices().values()), layer.substeps, layer.block, layer.qk)
        for layer in dict.fromkeys(layers_of(spec))
        if isinstance(layer, RecurrenceSpec)
    )
    return (layers, config["model"]["width"], config["model"]["heads"], config["training"]["backend"])
