"""Floor 2: what a recurrence is. Components, specs, the mixer they make, and the language model around it."""

from .attention import SoftmaxAttention
from .component import (
    AXES,
    Choice,
    Chosen,
    Component,
    Erase,
    Feedback,
    Forgetting,
    Gate,
    HeadShape,
    Preconditioner,
    StepSize,
    ValueGain,
    choose,
    component,
    components,
)
from .initialise import initialise
from .language_model import LanguageModel
from .layers import Projection
from .mixer import Mixer, RecurrentMixer
from .multipliers import Multiplier, Multiplies
from .settings import Block, QueryKey
from .signals import Forget, GateOutput, Preconditioned, Step, Told, wide
from .spec import (
    About,
    AttentionSpec,
    HybridSpec,
    LayerSpec,
    MixerSpec,
    RecurrenceSpec,
    layers_of,
    spec_from_mapping,
    with_block,
)
from .state import MixerState

__all__ = [
    "AXES",
    "About",
    "AttentionSpec",
    "Block",
    "Choice",
    "Chosen",
    "Component",
    "Erase",
    "Feedback",
    "Forget",
    "Forgetting",
    "Gate",
    "GateOutput",
    "HeadShape",
    "HybridSpec",
    "LanguageModel",
    "LayerSpec",
    "Mixer",
    "MixerSpec",
    "MixerState",
    "Multiplier",
    "Multiplies",
    "Preconditioned",
    "Preconditioner",
    "Projection",
    "QueryKey",
    "RecurrenceSpec",
    "RecurrentMixer",
    "SoftmaxAttention",
    "Step",
    "StepSize",
    "Told",
    "ValueGain",
    "choose",
    "component",
    "components",
    "initialise",
    "layers_of",
    "spec_from_mapping",
    "wide",
    "with_block",
]
