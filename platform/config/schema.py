"""The typed schema of a study. Every field says its meaning and its limits; loading is strict (see `loader`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ...errors import UserError, unknown
from ...strict import option

TURNED = ("recurrence", "task", "model", "training")
"""The first words of an axis."""
SECTIONS = (*TURNED, "measure")
"""The parts of `base`."""

BACKENDS = ("auto", "reference", "torch", "cpu", "triton", "fla")
"""Every backend that `kernels` knows (which is not imported here: it would load torch). Which of them work is the machine's."""

COMPONENTS = ("gate", "step_size", "preconditioner", "forgetting", "erase", "value_gain", "feedback")
"""The keys of a recurrence that choose a component (`recurrences.AXES`, which is not imported here: it would load torch)."""


@dataclass(frozen=True)
class ModelConfig:
    """The language model around the recurrence, shared by every arm unless it is an axis.

    With a `preset` the other settings are changes to it. A plan writes the preset's settings out, so that a trial names none.
    """

    preset: str = option("", "a published model (or a preset's YAML file) that the settings here change; empty: none")
    variation: str = option(
        "auto", "the preset's settings for some cards: auto: those of the arm's card; none; or a card's name, to take its"
    )
    width: int = option(64, "model width", min=1, max=65536)
    layers: int = option(2, "number of blocks", min=1, max=1024)
    heads: int = option(2, "number of heads", min=1, max=4096)
    mlp_ratio: float = option(0.0, "MLP hidden width / width; 0: no MLP, unless mlp_hidden gives its width", min=0, max=64)
    mlp_hidden: int = option(0, "MLP hidden width, in place of mlp_ratio; 0: none", min=0, max=2**20)
    tied: bool = option(True, "share embedding and head")
    init_std: float = option(0.02, "standard deviation of the projections' initial weights", above=0, max=10)
    block: dict[str, Any] = option(
        factory=dict, help="settings of the mixer's block for every arm and layer: short_conv, output_gate, expand_v, ..."
    )

    def __post_init__(self) -> None:
        if self.mlp_ratio and self.mlp_hidden:
            raise UserError(
                f"mlp_hidden: {self.mlp_hidden} stands beside mlp_ratio {self.mlp_ratio:g}; give the hidden width by one of them"
            )
        if self.variation != "auto" and not self.preset:
            raise UserError(f"variation: {self.variation!r} is of no preset; name one in `preset`")


RESOLVED = ("preset", "variation", "block", "mlp_ratio")
"""Fields of ModelConfig that a plan resolves into other settings: no frozen trial has them."""


@dataclass(frozen=True)
class TrainingConfig:
    """How one trial is trained."""

    steps: int = option(300, "optimiser steps", min=1, max=10**9)
    batch: int = option(64, "sequences per step", min=1)
    lr: float = option(3e-3, "peak learning rate", above=0)
    warmup: float = option(0.1, "fraction of the steps with a rising learning rate", min=0, max=1)
    final_lr: float = option(0.1, "learning rate at the end of the cosine / peak", min=0, max=1)
    weight_decay: float = option(0.1, "AdamW weight decay of matrices (never of component parameters)", min=0)
    betas: tuple[float, float] = option((0.9, 0.95), "AdamW's moments", min=0, below=1)
    clip: float = option(1.0, "largest gradient norm; 0: no clipping", min=0)
    precision: Literal["auto", "fp32", "bf16"] = option("auto", "auto: bf16 autocast where it is faster, else fp32")
    backend: str = option("auto", "kernel backend: auto, reference, torch, cpu, triton, fla, where the trial's device serves it")
    eval_examples: int = option(1000, "validation and test sequences scored at the end, at most", min=1)
    log_every: int = option(20, "steps between two points of the curves", min=1)
    checkpoint_seconds: float = option(10.0, "seconds between two checkpoints", min=0)

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise unknown("backend", self.backend, BACKENDS, "backend")


@dataclass(frozen=True)
class MeasureConfig:
    """What is measured of a trained model beyond its scores; nothing of it changes how it is trained."""

    diagnostics: bool = option(False, "what the layers do: norms of states and keys, effective steps, gates, residuals")
    throughput: dict[str, Any] = option(
        factory=dict, help="prefill and decoding speed: {contexts: [1024, 4096], batches: [1, 16], repeats: 5}; empty: none"
    )


BOOKKEEPING = ("log_every", "checkpoint_seconds")
"""Fields of TrainingConfig that change what is written down, not the numbers: they are left out of a trial's hash."""


@dataclass(frozen=True)
class BaseConfig:
    """What every arm starts from. `recurrence` and `task` are a name, or a mapping with a name and options."""

    recurrence: Any = option(None, "a card's name or file, {card: NAME, axis: choice}, or a pattern of cards: gdn gdn softmax")
    task: Any = option(None, "a task's name, or {name: NAME, preset: ..., option: ...}")
    model: dict[str, Any] = option(factory=dict, help="see ModelConfig")
    training: dict[str, Any] = option(factory=dict, help="see TrainingConfig")
    measure: dict[str, Any] = option(factory=dict, help="see MeasureConfig")


@dataclass(frozen=True)
class ResourcesConfig:
    """What a trial may use, and where trials run."""

    cpus_per_trial: int = option(1, "CPU cores (and threads) of a trial", min=1)
    gpus_per_trial: float = option(0.0, "GPUs of a trial; a fraction shares one", min=0)
    trials_at_once: int = option(0, "trials side by side; 0: as many as the cores and GPUs hold", min=0)
    retries: int = option(2, "how often a trial whose worker died is taken up again from its checkpoint", min=0)
    address: str = option("local", "local: this machine; or a Ray cluster's address (`auto`, `ray://host:10001`)")


@dataclass(frozen=True)
class PartConfig:
    """One comparison of a study: its own base and axes over the study's."""

    base: dict[str, Any] = option(factory=dict, help="merged over the study's base")
    axes: dict[str, Any] = option(factory=dict, help="merged over the study's axes")
    seeds: Any = option(None, "instead of the study's seeds")
    baseline: str = option("", "arm that the others are compared with; empty: the first arm")
    metric: str = option("", "measurement to compare; empty: the task's own")


@dataclass(frozen=True)
class StudyConfig:
    """A study: base + axes + seeds, in one part or in several."""

    name: str = option("", "name of the study and of its MLflow experiment")
    description: str = option("", "one or two sentences for `deltalab list`")
    base: dict[str, Any] = option(factory=dict, help="what every arm starts from")
    axes: dict[str, Any] = option(factory=dict, help="dotted path -> list of values; the grid is their product")
    seeds: Any = option(None, "list of seeds, or a number n for 0..n-1")
    parts: dict[str, Any] = option(factory=dict, help="name -> comparison with its own base and axes")
    baseline: str = option("", "arm that the others are compared with; empty: the first arm")
    metric: str = option("", "measurement to compare; empty: the task's own")
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
