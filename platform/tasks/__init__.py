"""Tasks: what a model is trained and measured on. Arrays in numpy, no torch, no training.

    task = build_task({"name": "mqar", "preset": "quick", "pairs": 4})
    data = prepare_task(task, Path("deltalab-data/cache"))
    inputs, targets = data.train.rows(np.array([0, 1]))     # int64 [2, T], int64 [2, T]; IGNORE where nothing is scored

A new task is one file: a subclass of `Task` with the `@register` decorator, imported below.
"""

from __future__ import annotations

from .base import IGNORE, Faceted, PreparedTask, Progress, Segmented, Split, Task
from .composed import Joined, document_starts, fingerprint, parts_of, prepare_task
from .lm import LmTask
from .mad_copy import MadCompressionTask, MadSelectiveCopyTask
from .mad_fuzzy import MadFuzzyRecallTask
from .mad_memory import MadMemorisationTask
from .mad_recall import MadNoisyRecallTask, MadRecallTask
from .mqar import MqarTask
from .niah import NiahTask
from .niah_text import NiahTextTask
from .palindrome import PalindromeTask
from .recall_text import RecallTextTask
from .registry import build_task, effective, register, task_class, task_names
from .stack import StackTask
from .state_tracking import StateTrackingTask
from .synthetic import SyntheticConfig, SyntheticTask
from .tokenizers import TextTokenizer, load_tokenizer

__all__ = [
    "IGNORE",
    "Faceted",
    "Joined",
    "LmTask",
    "MadCompressionTask",
    "MadFuzzyRecallTask",
    "MadMemorisationTask",
    "MadNoisyRecallTask",
    "MadRecallTask",
    "MadSelectiveCopyTask",
    "MqarTask",
    "NiahTask",
    "NiahTextTask",
    "PalindromeTask",
    "PreparedTask",
    "Progress",
    "RecallTextTask",
    "Segmented",
    "Split",
    "StackTask",
    "StateTrackingTask",
    "SyntheticConfig",
    "SyntheticTask",
    "Task",
    "TextTokenizer",
    "build_task",
    "document_starts",
    "effective",
    "fingerprint",
    "load_tokenizer",
    "parts_of",
    "prepare_task",
    "register",
    "task_class",
    "task_names",
]
