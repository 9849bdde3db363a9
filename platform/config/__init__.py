"""Typed study configuration, strict loading, the data root."""

from .loader import Part, Study, load_study, study_names
from .root import DataRoot
from .schema import BOOKKEEPING, RESOLVED, SECTIONS, MeasureConfig, ModelConfig, ResourcesConfig, TrainingConfig

__all__ = [
    "BOOKKEEPING",
    "RESOLVED",
    "SECTIONS",
    "DataRoot",
    "MeasureConfig",
    "ModelConfig",
    "Part",
    "ResourcesConfig",
    "Study",
    "TrainingConfig",
    "load_study",
    "study_names",
]
