"""Which layers a compiled token serves (`kernels/decode.py`), and what it is told about their components.

A component is known here by its very class: one that derives from it, or a plug-in's, has its own law and takes the general way.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from ..kernels.cpu.decode_layer import NOTHING, Around, Law, Layer, Multiplier, Part, Product, Step, Weights
from ..kernels.decode import FEW, Carried, Token
from .erase import ChannelErase, DeltaErase, NoErase, NoFeedback, ReadKeyFeedback, ScaledErase
from .exact import Exact
from .forgetting import ConstantForgetting, GatedForgetting, LearnedForgetting, NoForgetting, TiedForgetting, TokenForgetting
from .gates import ChannelGate, ChannelSigmoidGate, FixedGate, NoGate, ScalarGate, ScalarSigmoidGate
from .layers import L2_EPS, Projection, RMSNorm, ShortConvolution, Skip
from .preconditioners import Diagonal, Hypergradient, NoPreconditioner
from .step_sizes import Constant, ErrorFree, Kaczmarz, Longhorn, One, Sigmoid, TimeStep
from .value_gains import ChannelGain, InverseNorm, LearnedGain, NoGain

if TYPE_CHECKING:
    from .mixer import RecurrentMixer

_LAWS: dict[type, Callable[[Any], Law | None]] = {
    NoGate: lambda config: None,
    FixedGate: lambda config: Law("linear"),
    ScalarGate: lambda config: Law("softplus"),
    ScalarSigmoidGate: lambda config: Law("log_sigmoid", high=config.divisor),
    ChannelGate: lambda config: Law("bounded" if config.lower_bound else "softplus", low=config.lower_bound, per_channel=True),
    ChannelSigmoidGate: lambda config: Law("log_sigmoid", high=config.divisor, per_channel=True),
    NoForgetting: lambda config: None,
    ConstantForgetting: lambda config: Law("linear"),
    LearnedForgetting: lambda config: Law("log_sigmoid"),
    TokenForgetting: lambda config: Law("log_sigmoid"),
    GatedForgetting: lambda config: Law("softplus"),
    TiedForgetting: lambda config: Law("tied"),
}
_STEPS: dict[type, Callable[[Any], Step]] = {
    One: lambda config: Step(),
    Constant: lambda config: Step("plain", Law("linear")),
    Sigmoid: lambda config: Step("plain", Law("sigmoid", *config.range)),
    TimeStep: lambda config: Step("dt"),
    Kaczmarz: lambda config: Step("kaczmarz", Law("sigmoid", *config.range), config.eps),
    Longhorn: lambda config: Step("longhorn_gate" if config.own_gate else "longhorn", Law("sigmoid", *config.range), config.eps),
    ErrorFree: lambda config: Step("efla", Law("sigmoid", *config.range), config.eps),
}
_ERASES: dict[type, Any] = {NoErase: "none", DeltaErase: "key", ScaledErase: "head", ChannelErase: "channel"}
_VALUES: dict[type, Any] = {NoGain: "one", InverseNorm: "inverse_norm", LearnedGain: "head", ChannelGain: "channel"}
_ACTIVATIONS = ("none", "silu", "elu1")


class Served(NamedTuple):
    """How a mixer's tokens are decoded (`layer`, None: they are not), and the token made of its tensors (None: some have to be
    computed at every token)."""

    layer: Layer | None
    token: Token | None


class Run(NamedTuple):
    """Blocks behind each other whose token is one compiled call; `normed`: with the norm that the model ends with."""

    mixers: tuple[RecurrentMixer, ...]
    token: Token
    normed: bool
    dtypes: set[torch.dtype]
    """Of the mixers' parameters."""

    def serves(self, x: Tensor, before: Sequence[Carried]) -> bool:
        """Whether it decodes x from what the layers carry."""
        if self.dtypes != {x.dtype} or x.shape[2] != self.mixers[0].shape.width or len(x) > FEW:
            return False
        if any(mixer.observer is not None or not mixer.leaves_tokens for mixer in self.mixers):
            return False
        return self.token.serves(x, before)


def hooked(module: nn.Module) -> bool:
    """Whether someone watches or changes what goes in or out of `module`."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def served(mixer: RecurrentMixer) -> Served:
    """How this mixer's tokens are decoded."""
    part = part_of(mixer, None)
    return Served(layer_of(mixer), None) if part is None else Served(part.layer, Token(part))


def part_of(mixer: RecurrentMixer, around: Around | None) -> Part | None:
    """A mixer's part of a token; None where it has none, or some of its tensors have to be computed at every token."""
    layer = layer_of(mixer)
    weights = None if layer is None else weights_of(mixer, None)
    return None if layer is None or weights is None else Part(layer, weights, around)


def runs_of(blocks: Sequence[tuple[RecurrentMixer, Part] | None], norm: RMSNorm) -> dict[int, Run]:
    """The longest runs of blocks with a part (None: a block has none), by the number of their first; `norm`: after the last."""
    found: dict[int, Run] = {}
    for has_part, members in itertools.groupby(range(len(blocks)), lambda i: blocks[i] is not None):
        if has_part:
            numbers = list(members)
            mixers, parts = zip(*(block for block in map(blocks.__getitem__, numbers) if block is not None), strict=True)
            normed = numbers[-1] == len(blocks) - 1 and plain_norm(norm)
            if normed:
                parts = *parts[:-1], _with_norm(parts[-1], norm)
            found[numbers[0]] = Run(mixers, Token(*parts), normed, {mixer.in_proj.weight.dtype for mixer in mixers})
    return found


def _with_norm(part: Part, norm: RMSNorm) -> Part:
    assert part.around is not None, "a block's part"
    return part._replace(around=part.around._replace(next_norm=norm.weight, next_eps=norm.eps))


def around_of(norm: Any, mlp_norm: Any, up: nn.Module | None = None, down: nn.Module | None = None) -> Around | None:
    """The block with these norms, and with an MLP of these projections or none; None where they are others, or watched."""
    norms = [one for one in (norm, mlp_norm) if one is not None]
    if not all(plain_norm(one) and one.eps == norm.eps for one in norms):
        return None
    if up is None or down is None:
        return Around(norm.weight, norm.eps)
    if not (plain_projection(up) and plain_projection(down)):
        return None
    up_product, down_product = (Product(None, module.weight, module.bias) for module in (up, down))
    return Around(norm.weight, norm.eps, mlp_norm.weight, up_product, down_product)


def layer_of(mixer: RecurrentMixer) -> Layer | None:
    """What a compiled token is told once for all, where it serves this layer; None where it does not."""
    spec, shape, block = mixer.spec, mixer.shape, mixer.block
    laws = all(type(part) in _LAWS for part in (mixer.gate, mixer.forgetting)) and type(mixer.step_size) in _STEPS
    alike = all(type(part) is type(mixer.step_size) and part.config == mixer.step_size.config for part in mixer.later_steps)
    reads = type(mixer.erase) in _ERASES and type(mixer.feedback) in (NoFeedback, ReadKeyFeedback)
    layers = ((mixer.conv, ShortConvolution), (mixer.norm, RMSNorm), (mixer.skip, Skip))
    plain = all(part is None or type(part) is kind for part, kind in layers) and type(mixer.value_gain) in _VALUES
    if not (laws and alike and reads and plain and _multiplies(mixer)) or spec.qk.activation not in _ACTIVATIONS:
        return None
    if any(hooked(part) for part in (*mixer._modules.values(), *mixer.later_steps) if part is not None):
        return None
    if type(mixer.step_size) is TimeStep and type(mixer.gate) is not ScalarGate:
        return None
    eps_q, eps_k = (L2_EPS if kind == "l2" else None for kind in (spec.qk.normalise_q, spec.qk.normalise_k))
    return Layer(
        shape.heads,
        shape.key,
        shape.value,
        _LAWS[type(mixer.gate)](mixer.gate.config),
        _STEPS[type(mixer.step_size)](mixer.step_size.config),
        _multiplier(mixer),
        _ERASES[type(mixer.erase)],
        eps_q,
        eps_k,
        0.0 if mixer.norm is None else mixer.norm.eps,
        block.key_heads,
        (spec.qk.activation, block.value_activation),
        type(mixer.feedback) is ReadKeyFeedback,
        _VALUES[type(mixer.value_gain)],
        getattr(mixer.value_gain.config, "eps", 0.0),
        block.output_gate,
        spec.substeps,
    )


def _multiplies(mixer: RecurrentMixer) -> bool:
    """Whether the preconditioner is one of those that a compiled token has, with options that it has."""
    config, kind = mixer.preconditioner.config, type(mixer.preconditioner)
    if kind is NoPreconditioner:
        return True
    if kind is Exact:
        return bool(config.control == "none" and config.side != "both")
    if kind not in (Diagonal, Hypergradient) or (config.control, config.normalise) != ("none", "none"):
        return False
    if mixer.spec.substeps > 1 and getattr(config, "clip", "none") == "chunk":
        return False  # after a token's last substep alone
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
    if kind is Exact:
        matrix: Any = "gram" if config.side == "query" else "inverse"
        solver = {"limit": config.limit, "floor": config.floor, "iterations": config.iterations}
        return Multiplier(matrix, config.side, forget, gain, **solver)
    if kind is Diagonal:
        return Multiplier("diagonal", config.side, forget, gain, math.log(config.x))
    box = (-math.inf, math.inf) if config.clip == "none" else config.box
    return Multiplier("hypergradient", config.side, forget, gain, 0.0, config.eta, config.aware, box)


def weights_of(mixer: RecurrentMixer, x: Tensor | None) -> Weights | None:
    """The tensors of a layer's token at x: a projection's weight; or its answer, where it is no plain projection (an adapter, a
    pruned or quantised one), is watched by a hook, or x has so many sequences that torch's product is the faster one. Without an
    x: None where an answer would be needed."""
    make = _Maker(x, mixer.in_proj.weight.dtype)
    forgetting, gate = mixer.forgetting, mixer.gate_proj
    laws = (
        make.law(mixer.gate),
        make.law(mixer.step_size),
        make.law(forgetting),
        make.product(forgetting.gain) if type(forgetting) is GatedForgetting else NOTHING,
    )
    later = tuple(make.law(part) for part in mixer.later_steps)
    read, value = (
        make.product(part.proj) if type(part) in (ChannelErase, ChannelGain) else NOTHING
        for part in (mixer.erase, mixer.value_gain)
    )
    mixed, out_gate = make.product(mixer.in_proj), NOTHING if gate is None else make.product(gate)
    ends = make.few and plain_projection(mixer.out_proj)
    if make.failed or (x is None and not ends):
        return None
    return Weights(
        mixed,
        None if mixer.conv is None else mixer.conv.weight,
        laws,
        read,
        value,
        out_gate,
        Product(weight=mixer.out_proj.weight, bias=mixer.out_proj.bias) if ends else NOTHING,
        None if mixer.norm is None else mixer.norm.weight,
        mixer.preconditioner._parameters.get("centre"),
        mixer.erase._parameters.get("c"),
        mixer.feedback._parameters.get("D"),
        mixer.value_gain._parameters.get("gain"),
        None if mixer.skip is None else mixer.skip.D,
        mixer.preconditioner._parameters.get("ridge"),
        later,
    )


class _Maker:
    """Makes products of modules; `failed` where it had no x and would have needed one."""

    def __init__(self, x: Tensor | None, dtype: torch.dtype) -> None:
        self.x, self.dtype, self.few, self.failed = x, dtype, x is None or len(x) <= FEW, False

    def product(self, module: nn.Module, bias: Tensor | None = None, A_log: Tensor | None = None) -> Product:
        if self.few and plain_projection(module):
            return Product(None, module.weight, _one_of(module.bias, bias), A_log)
        pair = tuple(module) if type(module) is nn.Sequential and not hooked(module) else ()
        return self.pair(*pair, bias, A_log) if len(pair) == 2 else self._answer(module, bias, A_log)

    def pair(self, down: nn.Module, up: nn.Module, bias: Tensor | None, A_log: Tensor | None) -> Product:
        """Of up(down(x)), a low rank."""
        if self.few and plain_projection(down) and plain_projection(up) and down.bias is None:
            return Product(None, up.weight, _one_of(up.bias, bias), A_log, down.weight)
        return self._answer(lambda x: up(down(x)), bias, A_log)

    def _answer(self, project: Callable[[Tensor], Tensor], bias: Tensor | None, A_log: Tensor | None) -> Product:
        if self.x is None:
            self.failed = True
            return NOTHING
        return Product(project(self.x), None, bias, A_log)

    def law(self, part: Any) -> Product:
        parameters = part._parameters
        bias, A_log = parameters.get("dt_bias"), parameters.get("A_log")
        if "proj" in part._modules:
            return self.product(part.proj, bias, A_log)
        if "up" in part._modules:
            return self.pair(part.down, part.up, bias, A_log)
        if type(part) is FixedGate:
            return Product(bias=_slopes(part.config.first, part.shape.heads, self.dtype))
        if type(part) in (Constant, ConstantForgetting):
            number = part.config.beta if type(part) is Constant else math.log(part.config.gamma)
            return Product(bias=torch.full((part.shape.heads,), number, dtype=self.dtype, device="cpu"))
        return Product(bias=parameters["b"]) if type(part) is LearnedForgetting else NOTHING


def _one_of(own: Tensor | None, bias: Tensor | None) -> Tensor | None:
    assert own is None or bias is None, "a law has one bias"
    return bias if own is None else own


def plain_norm(module: nn.Module) -> TypeGuard[RMSNorm]:
    return type(module) is RMSNorm and not hooked(module)


def plain_projection(module: nn.Module) -> TypeGuard[Projection]:
    return type(module) is Projection and not hooked(module)


def _slopes(first: float, heads: int, dtype: torch.dtype) -> Tensor:
    """FixedGate's."""
    return torch.log1p(-torch.exp2(-first - torch.arange(heads, dtype=torch.float64, device="cpu"))).to(dtype)
