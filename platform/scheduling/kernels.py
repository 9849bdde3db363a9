"""Kernels made ready by the driver: compiled and held against the definition once, before workers would do it side by side.

Ray hides what a worker prints, and every worker would compile the same loops; here the user sees what is waited for. The gate
runs a layer's loops, in float32; a rehearsed step runs those of a whole model, in the trial's precision. Both run as a worker
does, with its threads: how many there are decides which loops run. Workers of other nodes, and of GPUs, pass the gate by
themselves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from ...recurrences import MixerSpec, RecurrenceSpec, layers_of, spec_from_mapping
from ...strict import build
from ..config import ModelConfig, TrainingConfig
from ..study import build_model
from ..training import Hardware, pass_gate, prepare_device
from .display import spinner
from .trial import Job

_NUMBERS = 1 << 18
"""Numbers of a layer in a rehearsed step: more than any loop asks for before it runs."""
_VOCAB = 32


def prepare_kernels(jobs: Sequence[Job], console: Console, stopped: Callable[[], bool]) -> None:
    """Pass the gate for the jobs' recurrences on this machine's CPU and rehearse a step, one of each kind: those that differ in a
    number alone run the same loops, and their workers pass the gate in a tenth of a second each.

    Whatever is wrong here is wrong in the worker too, whose trial then fails with the message.
    """
    kinds: dict[tuple[object, ...], tuple[Job, MixerSpec]] = {}
    for job in jobs:
        spec = spec_from_mapping(job.config["recurrence"])
        kinds.setdefault(_kind(job, spec), (job, spec))
    if not kinds:
        return
    with spinner(console, "checking kernels ...") as status:
        for number, (job, spec) in enumerate(kinds.values(), start=1):
            if stopped():
                return
            if status is not None:
                status.update(f"checking kernels: {escape(spec.name)} ({number} of {len(kinds)}) ...")
            model, training = job.config["model"], job.config["training"]
            with contextlib.suppress(Exception), _as_a_worker(job) as hardware:
                pass_gate(spec, model["width"], model["heads"], training["backend"], hardware.device, Path(job.cache))
                rehearse(job, spec, hardware)


def rehearse(job: Job, spec: MixerSpec, hardware: Hardware) -> None:
    """One training step of the job's model, with a layer of each kind and few tokens, and a score of two: what they compile stays
    on disk. The batch is the job's, since the number of heads side by side decides how they are shared among threads."""
    training = build(TrainingConfig, job.config["training"], "training")
    config = build(ModelConfig, job.config["model"], "model")
    few = replace(config, layers=min(config.layers, len(layers_of(spec))))
    model = build_model(spec, few, _VOCAB, training.backend, seed=0).to(hardware.device)
    length = max(2, _NUMBERS // (config.width * training.batch))
    tokens = torch.randint(_VOCAB, (training.batch, length + 1), generator=torch.Generator().manual_seed(0))
    with hardware.autocast():
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    loss.backward()  # type: ignore[no-untyped-call]
    with torch.no_grad(), hardware.autocast():
        model(tokens[:1, :2])  # few rows without gradients have loops of their own


@contextlib.contextmanager
def _as_a_worker(job: Job) -> Iterator[Hardware]:
    """This process as a worker that runs the job; afterwards as it was."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        yield prepare_device(job.threads, job.config["training"]["precision"], job.config["model"]["width"])
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
        torch.set_flush_denormal(False)


def _kind(job: Job, spec: MixerSpec) -> tuple[object, ...]:
    """The components of every layer, without their settings, and what else decides which loops run."""
    layers = tuple(
        (*(choice.name for choice in layer.choices().values()), layer.substeps, layer.block, layer.qk)
        for layer in dict.fromkeys(layers_of(spec))
        if isinstance(layer, RecurrenceSpec)
    )
    model: dict[str, Any] = job.config["model"]
    training: dict[str, Any] = job.config["training"]
    sizes = (model["width"], model["heads"], bool(model.get("mlp_hidden")), training["batch"], job.threads)
    return (layers, *sizes, training["backend"], training["precision"])
