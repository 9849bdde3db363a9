"""Tasks: what a model is trained and measured on. Arrays in numpy, no torch, no training.

    task = build_task({"name": "mqar", "preset": "quick", "pairs": 4})
    data = prepare_task(task, Path("deltalab-data/cache"))
    inputs, targets = data.train.rows(np.array([0, 1]))     # int64 [2, T], int64 [2, T]; IGNORE where nothing is scored

A new task is one file: a subclass of `Task` with the `@register` decorator, imported below.
"""

from __future__ import annotations

from .base import IGNORE, Faceted, PreparedTask, Progress, Split, Task
from .composed import Joined, fingerprint, parts_of, prepare_task
from .lm import LmTask
from .mqar import MqarTask
from .registry import build_task, effective, register, task_class, task_names

__all__ = [
    "IGNORE",
    "Faceted",
    "Joined",
    "LmTask",
    "MqarTask",
    "PreparedTask",
    "Progress",
    "Split",
    "Task",
    "build_task",
    "effective",
    "fingerprint",
    "parts_of",
    "prepare_task",
    "register",
    "task_class",
    "task_names",
]
