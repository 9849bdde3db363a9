"""Which layers a compiled token serves (`kernels/decode.py`), and what it is told about their components.

A component is known here by its very class: one that derives from it, or a plug-in's, has its own law and takes the general way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..kernels.decode import Law, Layer, Multiplier, Terms
from .erase import DeltaErase, NoErase, NoFeedback
from .forgetting import GatedForgetting, NoForgetting, TokenForgetting
from .gates import ChannelGate, ChannelSigmoidGate, NoGate, ScalarGate, ScalarSigmoidGate
from .layers import L2_EPS, Projection
from .preconditioners import Diagonal, Hypergradient, NoPreconditioner
from .step_sizes import One, Sigmoid
from .value_gains import NoGain

if TYPE_CHECKING:
    from .mixer import RecurrentMixer

_LAWS: dict[type, Callable[[Any], Law | None]] = {
    NoGate: lambda config: None,
    One: lambda config: None,
    NoForgetting: lambda config: None,
    ScalarGate: lambda config: Law("softplus"),
    ScalarSigmoidGate: lambda config: Law("log_sigmoid", high=config.divisor),
    ChannelGate: lambda config: Law("bounded" if config.lower_bound else "softplus", low=config.lower_bound, per_channel=True),
    ChannelSigmoidGate: lambda config: Law("log_sigmoid", high=config.divisor, per_channel=True),
    Sigmoid: lambda config: Law("sigmoid", *config.range),
    TokenForgetting: lambda config: Law("log_sigmoid"),
    GatedForgetting: lambda config: Law("softplus"),
}
_OF_INPUT = (ScalarGate, ScalarSigmoidGate, Sigmoid, TokenForgetting, GatedForgetting)
"""Those that project the layer's input once, by `proj`; the others, per channel, by `down` and `up`."""
NOTHING = Terms()


def layer_of(mixer: RecurrentMixer) -> Layer | None:
    """What a compiled token is told once for all, where it serves this layer; None where it does not."""
    spec, shape = mixer.spec, mixer.shape
    parts = (type(mixer.erase), type(mixer.value_gain), type(mixer.feedback))
    plain = parts in ((DeltaErase, NoGain, NoFeedback), (NoErase, NoGain, NoFeedback)) and mixer.activated
    known = all(type(part) in _LAWS for part in (mixer.gate, mixer.step_size, mixer.forgetting)) and _multiplies(mixer)
    if not (plain and known) or spec.substeps > 1 or mixer.block.key_heads or mixer.block.skip:
        return None
    eps_q, eps_k = (L2_EPS if kind == "l2" else None for kind in (spec.qk.normalise_q, spec.qk.normalise_k))
    gate, step_size = (_LAWS[type(part)](part.config) for part in (mixer.gate, mixer.step_size))
    eps = 0.0 if mixer.norm is None else mixer.norm.eps
    return Layer(shape.heads, shape.key, shape.value, gate, step_size, _multiplier(mixer), spec.erases, eps_q, eps_k, eps)


def _multiplies(mixer: RecurrentMixer) -> bool:
    """Whether the preconditioner is one of those that a compiled token has, with options that it has."""
    config, kind = mixer.preconditioner.config, type(mixer.preconditioner)
    if kind is NoPreconditioner:
        return True
    if kind not in (Diagonal, Hypergradient) or (config.control, config.normalise) != ("none", "none"):
        return False
    if kind is Diagonal:
        options = (config.squash, config.interval, config.exponent, config.current)
        if options != ("softsign", "symmetric", 1.0, True):
            return False
    return mixer.spec.unit_keys and getattr(mixer.forgetting.config, "anchor", "zero") == "zero"


def _multiplier(mixer: RecurrentMixer) -> Multiplier | None:
    config, kind, forgetting = mixer.preconditioner.config, type(mixer.preconditioner), mixer.forgetting
    if kind is NoPreconditioner:
        return None
    forget = _LAWS[type(forgetting)](forgetting.config)
    gain = Law("sigmoid") if type(forgetting) is GatedForgetting else None
    if kind is Diagonal:
        return Multiplier("diagonal", config.side, forget, gain, math.log(config.x))
    box = (-math.inf, math.inf) if config.clip == "none" else config.box
    return Multiplier("hypergradient", config.side, forget, gain, 0.0, config.eta, config.aware, box)


def terms_of(mixer: RecurrentMixer, x: Tensor) -> list[Terms]:
    """The tensors of a layer's laws at x: gate, step size, forgetting and gain."""
    forgetting = mixer.forgetting
    gain = _projected(forgetting.gain, x, None, None) if type(forgetting) is GatedForgetting else NOTHING
    return [*(_terms(part, x) for part in (mixer.gate, mixer.step_size, forgetting)), gain]


def _terms(part: Any, x: Tensor) -> Terms:
    parameters = part._parameters
    bias, A_log = parameters.get("dt_bias"), parameters.get("A_log")
    if type(part) in _OF_INPUT:
        return _projected(part.proj, x, bias, A_log)
    return Terms(part.up(part.down(x)), None, bias, A_log) if type(part) in (ChannelGate, ChannelSigmoidGate) else NOTHING


def _projected(module: Any, x: Tensor, bias: Tensor | None, A_log: Tensor | None) -> Terms:
    """The projection's weight, for the compiled token; or its answer, where it is no plain projection (an adapter, a pruned or
    quantised one) or is watched by a hook."""
    if type(module) is not Projection or hooked(module):
        return Terms(module(x), None, bias, A_log)
    own = module.bias
    assert own is None or bias is None, "a law has one bias"
    return Terms(None, module.weight, own if bias is None else bias, A_log)


def hooked(module: Any) -> bool:
    """Whether someone watches or changes what goes in or out of `module`."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
