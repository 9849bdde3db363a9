"""Studies: grid -> arms -> trials, checked and hashed before anything runs."""

from .arms import Arm, build_model, expand, resolve_model
from .measures import MEASURES, Measure, full_name, measure_of
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
    "measure_of",
    "plan_study",
    "resolve_model",
]
