"""Finished trials as models: found, loaded, exported, put through lm-eval."""

from .trial import Trained, find_trial, load_trained, trial_name

__all__ = ["Trained", "find_trial", "load_trained", "trial_name"]
