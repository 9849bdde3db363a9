"""Studies: grid -> arms -> trials, checked and hashed before anything runs."""

from .arms import Arm, build_model, expand
from .measures import MEASURES, Measure, full_name
from .plan import Plan, PlannedPart, PlannedTrial, plan_study

__all__ = [
    "MEASURES",
    "Arm",
    "Measure",
    "Plan",
    "PlannedPart",
    "PlannedTrial",
    "build_model",
    "expand",
    "full_name",
    "plan_study",
]
