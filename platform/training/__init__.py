"""One trial's training: optimiser, schedule, precision, checkpoints, and the scores at its end."""

from .checkpoint import load_checkpoint, save_checkpoint
from .device import Hardware, PeakMemory, prepare_device
from .loop import Diverged, Interrupted, Trainer
from .scores import Scores, evaluate

__all__ = [
    "Diverged",
    "Hardware",
    "Interrupted",
    "PeakMemory",
    "Scores",
    "Trainer",
    "evaluate",
    "load_checkpoint",
    "prepare_device",
    "save_checkpoint",
]
