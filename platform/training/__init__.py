"""One trial's training: optimiser, schedule, precision and checkpoints."""

from .checkpoint import load_checkpoint, save_checkpoint
from .device import Hardware, PeakMemory, prepare_device
from .gate import WrongKernel, pass_gate
from .loop import Diverged, Interrupted, Trainer

__all__ = [
    "Diverged",
    "Hardware",
    "Interrupted",
    "PeakMemory",
    "Trainer",
    "WrongKernel",
    "load_checkpoint",
    "pass_gate",
    "prepare_device",
    "save_checkpoint",
]
