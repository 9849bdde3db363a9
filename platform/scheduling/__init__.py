"""Running a study's trials with Ray Tune, and writing down what they report."""

from .launch import LaunchSummary, launch_study

__all__ = ["LaunchSummary", "launch_study"]
