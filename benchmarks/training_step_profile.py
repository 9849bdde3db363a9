"""The share of a training step per group of work, from torch's profiler.

Forward: the time within a marked module or function, less what is marked within it. Backward: a node of autograd belongs to the
group in whose forward it was made, which the profiler tells by a number that both carry.
"""

from __future__ import annotations

import contextlib
import gc
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function

from deltalab.platform.training import Trainer
from deltalab.recurrences.component import Component
from deltalab.recurrences.language_model import SwiGLU
from deltalab.recurrences.layers import Projection, RMSNorm
from deltalab.recurrences.mixer import Mixer

MARK = "group: "
WARM = 3
"""Steps that do not count."""
_BACKWARD = 1  # torch's RecordScope of a node of autograd
PRODUCTS, RECURRENCE, LOSS, NORMS, CONVOLUTION = "matrix products", "recurrence", "loss and head", "norms", "convolution"
GATES, OPTIMISER, CLIPPING, DATA, OTHER = "activations and gates", "optimiser", "gradient clipping", "data", "other"
GROUPS = (PRODUCTS, RECURRENCE, LOSS, NORMS, CONVOLUTION, GATES, OPTIMISER, CLIPPING, DATA, OTHER)
_OF_MODULE: tuple[tuple[type[nn.Module], str], ...] = (
    (Projection, PRODUCTS),
    (RMSNorm, NORMS),
    (Component, GATES),
    (SwiGLU, GATES),
    (Mixer, GATES),
)
_OF_FUNCTION = {
    "deltalab.recurrences.mixer.delta_rule": RECURRENCE,
    "deltalab.recurrences.mixer.l2_normalise": NORMS,
    "deltalab.recurrences.layers.normalise.add_rms_norm": NORMS,
    "deltalab.recurrences.layers.convolved_heads": CONVOLUTION,
    "deltalab.recurrences.language_model.linear_cross_entropy": LOSS,
    "torch.nn.utils.clip_grad_norm_": CLIPPING,
}


def shares(trainer: Trainer, step: Callable[[], object], steps: int) -> dict[str, tuple[float, float]]:
    """Group -> (forward, backward) share of a step's time; the largest first.

    Step by step, each with a profiler of its own: what one has recorded lies on the heap between the step's large tensors, and
    while it grows every one of them is fresh memory, which takes several times as long to write. Python looks through what was
    recorded for garbage between the steps, not within one, where it took a third of the time.
    """
    forward: dict[str, float] = defaultdict(float)
    backward: dict[str, float] = defaultdict(float)
    with _marked(trainer):
        for number in range(steps + WARM):
            gc.collect()
            gc.disable()
            with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler, record_function("step"):
                step()
            gc.enable()
            if number >= WARM:
                for whole, part in zip((forward, backward), _split(profiler.events()), strict=True):
                    for group, time in part.items():
                        whole[group] += time
    whole_time = sum(forward.values()) + sum(backward.values())
    found = {group: (forward[group] / whole_time, backward[group] / whole_time) for group in GROUPS}
    return dict(sorted(found.items(), key=lambda item: -sum(item[1])))


@contextlib.contextmanager
def _marked(trainer: Trainer) -> Iterator[None]:
    """Within it every module and function of a group says when it begins and ends."""
    with contextlib.ExitStack() as stack:
        for module in trainer.model.modules():
            group = next((name for kind, name in _OF_MODULE if isinstance(module, kind)), None)
            if group is not None:
                stack.enter_context(mock.patch.object(module, "forward", _marking(module.forward, group)))
        for path, group in _OF_FUNCTION.items():
            patcher = mock.patch(path)
            original, _ = patcher.get_original()
            stack.enter_context(mock.patch(path, _marking(original, group)))
        for owner, name, group in (
            (trainer.optimiser, "step", OPTIMISER),
            (trainer.optimiser, "zero_grad", OPTIMISER),
            (trainer.split, "rows", DATA),
            (trainer._order, "rows", DATA),
        ):
            stack.enter_context(mock.patch.object(owner, name, _marking(getattr(owner, name), group)))
        yield


def _marking(function: Callable[..., Any], group: str) -> Callable[..., Any]:
    def marked(*args: Any, **kwargs: Any) -> Any:
        with record_function(MARK + group):
            return function(*args, **kwargs)

    return marked


def _split(events: Any) -> tuple[dict[str, float], dict[str, float]]:
    """Microseconds per group, forward and backward, of what lies within a `step`."""
    forward: dict[str, float] = defaultdict(float)
    backward: dict[str, float] = defaultdict(float)
    made: dict[int, str] = {}
    nodes: list[tuple[int, float]] = []
    for thread in {event.thread for event in events}:
        open_: list[list[Any]] = []  # [event, group, time of what is marked within it]
        ordered = sorted((e for e in events if e.thread == thread), key=lambda e: (e.time_range.start, -e.time_range.end))
        node = None
        for event in ordered:
            while open_ and open_[-1][0].time_range.end <= event.time_range.start:
                _close(open_, forward)
            if node is not None and node.time_range.end > event.time_range.start:
                # Within a node's run: the node's own event is the first one that carries the number of its forward.
                if event.scope == _BACKWARD and nodes[-1][0] < 0:
                    nodes[-1] = (event.sequence_nr, nodes[-1][1])
            elif event.name.startswith("autograd::engine::evaluate_function"):
                node = event
                nodes.append((-1, event.time_range.elapsed_us()))
                if open_:
                    open_[-1][2] += event.time_range.elapsed_us()
            elif event.name.startswith(MARK) or event.name == "step":
                open_.append([event, event.name.removeprefix(MARK) if event.name != "step" else OTHER, 0.0])
            elif open_ and event.sequence_nr >= 0:
                made[event.sequence_nr] = open_[-1][1]
        while open_:
            _close(open_, forward)
    for number, elapsed in nodes:
        backward[made.get(number, OTHER)] += elapsed
    return forward, backward


def _close(open_: list[list[Any]], forward: dict[str, float]) -> None:
    event, group, within = open_.pop()
    whole = event.time_range.elapsed_us()
    forward[group] += whole - within
    if open_:
        open_[-1][2] += whole
