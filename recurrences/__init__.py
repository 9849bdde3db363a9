"""Floor 2: what a recurrence is. Components, specs, the mixer they make, and the language model around it."""

from .attention import SoftmaxAttention
from .component import AXES, Choice, Component, HeadShape, choose, component, components
from .initialise import initialise
from .language_model import LanguageModel
from .mixer import Mixer, MixerState, RecurrentMixer
from .spec import About, AttentionSpec, Block, MixerSpec, QueryKey, RecurrenceSpec, spec_from_mapping

__all__ = [
    "AXES",
    "About",
    "AttentionSpec",
    "Block",
    "Choice",
    "Component",
    "HeadShape",
    "LanguageModel",
    "Mixer",
    "MixerSpec",
    "MixerState",
    "QueryKey",
    "RecurrenceSpec",
    "RecurrentMixer",
    "SoftmaxAttention",
    "choose",
    "component",
    "components",
    "initialise",
    "spec_from_mapping",
]
