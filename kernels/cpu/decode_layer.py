"""What a compiled token is told of a layer (decode.py): its sizes and kinds, once for all, and its tensors.

B batch, H heads, G heads of q and k, K key width, V value width, D model width, n substeps, C = G K + n (G K + H V) channels,
W taps of the short convolution, F hidden width of an MLP.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

# As decode_parts.py numbers them.
_LAWS = ("", "softplus", "bounded", "sigmoid", "log_sigmoid", "linear", "tied")
_MULTIPLIERS = ("", "diagonal", "hypergradient", "inverse", "gram")
_SIDES = {"write": 1, "query": 2, "both": 3}
_ERASES = ("none", "key", "head", "channel")
_STEPS = ("plain", "kaczmarz", "longhorn", "longhorn_gate", "efla", "dt")
_VALUES = ("one", "inverse_norm", "head", "channel")
_ACTIVATIONS = ("none", "silu", "elu1")
_GATES = ("none", "silu", "sigmoid")


class Law(NamedTuple):
    """How a component's number y follows from its z [B,1,R], with R = H, or H K (`per_channel`: one per key channel):

    softplus     y = -exp(A_log) softplus(z)          A_log [H], at most 64
    bounded      y = low sigmoid(exp(A_log) z)
    sigmoid      y = low + (high - low) sigmoid(z)
    log_sigmoid  y = log sigmoid(z) / high
    linear       y = z
    tied         y = log a, of the gate: for a statistic that forgets as the state does
    """

    kind: Literal["softplus", "bounded", "sigmoid", "log_sigmoid", "linear", "tied"]
    low: float = 0.0
    high: float = 1.0
    per_channel: bool = False


class Product(NamedTuple):
    """z = W h + b, or W (W_inner h) + b, of the layer's input h: `weight` W [R,D] or [R,r], `inner` [r,D], `bias` b [R]. Or W h
    itself, as `z` [B,1,R]. Without both: b. `A_log` [H]: what a law has beside."""

    z: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    A_log: Tensor | None = None
    inner: Tensor | None = None


NOTHING = Product()


class Multiplier(NamedTuple):
    """A preconditioner that multiplies: m on the write key, the query, or both, from a statistic A [B,H,K].

        diagonal        A' = gamma A + gain k^2    m = exp(-log_x s(log(A' + 1e-6) - centre)),  s(r) = r / (1 + |r|), centre [H]
        hypergradient   m = A    A' = clip(gamma A + eta gain b (1 - b <A, k^2>) k^2, box)       b = beta if `aware`, else 1

    Or by a matrix, of a statistic [B,H,K,K]; Lambda = floor + softplus(ridge), ridge [H,K]:

        inverse         P' = (P^-1 gamma + c k k^T)^-1    k becomes gain P' k                    c = gain beta; side: write
        gram            G' = gamma G + c k k^T            q becomes (G' + Diag(Lambda))^-1 q     side: query

    the first where P stays within `limit`, the second by at most `iterations` of conjugate gradients (kernels/reference.py).
    gamma = exp(y) by the law `forget`, 1 without it; gain by its law, 1 without it. Only the first of a token's substeps forgets.
    """

    kind: Literal["diagonal", "hypergradient", "inverse", "gram"]
    side: str = "write"
    forget: Law | None = None
    gain: Law | None = None
    log_x: float = 0.0
    eta: float = 0.0
    aware: bool = False
    box: tuple[float, float] = (-float("inf"), float("inf"))
    limit: float = 1e6
    floor: float = 0.0
    iterations: int = 0

    @property
    def matrix(self) -> bool:
        return self.kind in ("inverse", "gram")


class Step(NamedTuple):
    """How beta follows from b, which is the law's number (1 without one), and the key k:

    plain          b                             dt     softplus(z), z the gate's
    kaczmarz       b / (|k|^2 + eps)             efla   (1 - exp(-b |k|^2)) / |k|^2
    longhorn       b / (1 + b |k|^2)             longhorn_gate   the same, and a = 1 - beta k^2 per channel

    All but plain and dt write and read k of any length as k / n, v / n and beta n^2 do, n = sqrt(|k|^2 + eps).
    """

    rule: Literal["plain", "kaczmarz", "longhorn", "longhorn_gate", "efla", "dt"] = "plain"
    law: Law | None = None
    eps: float = 0.0


@dataclass(frozen=True, eq=False)
class Layer:
    """What of a layer's tokens does not change.

    key_heads: G, 0 for H. substeps: n writes a token, each with a key, a value and a step of its own; the state forgets before
    the first and is read after the last. gate: the law of log a (None: a = 1). activation: of q and k, then of v: none | silu |
    elu1 (x + 1 or exp(x)). eps_q, eps_k: what is added to |q|^2 and |k|^2 before q and k are divided by their norms (None: they
    are not).
    erase: with which key r the memory is read before it is written: none (e = v), key (k), head (sigmoid(c) k) or channel
    (sigmoid(W h) k). feedback: q - D r reads. values: what v is multiplied by: one, inverse_norm (1 / sqrt(|k|^2 + eps_value), k
    before it is normalised), head (g), channel (sigmoid(W h)). eps: what is added to the mean square of the output. output_gate:
    none | silu | sigmoid of W h times the output.
    """

    heads: int
    key: int
    value: int
    gate: Law | None = None
    step: Step = Step()
    multiplier: Multiplier | None = None
    erase: Literal["none", "key", "head", "channel"] = "key"
    eps_q: float | None = 1e-6
    eps_k: float | None = 1e-6
    eps: float = 1e-5
    key_heads: int = 0
    activation: tuple[str, str] = ("silu", "silu")
    feedback: bool = False
    values: Literal["one", "inverse_norm", "head", "channel"] = "one"
    eps_value: float = 0.0
    output_gate: str = "none"
    substeps: int = 1

    @functools.cached_property
    def laws(self) -> tuple[Law | None, ...]:
        m = self.multiplier
        return (self.gate, self.step.law, None if m is None else m.forget, None if m is None else m.gain)

    @functools.cached_property
    def widths(self) -> tuple[int, int, int]:
        """Channels of q, k and v."""
        keys = (self.key_heads or self.heads) * self.key
        return keys, self.substeps * keys, self.substeps * self.heads * self.value

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        return (self.heads, self.key_heads or self.heads, self.key, self.value, self.substeps)

    @functools.cached_property
    def statistic(self) -> tuple[int, ...] | None:
        """The shape of a sequence's statistic."""
        m = self.multiplier
        return None if m is None else (self.heads, self.key, self.key) if m.matrix else (self.heads, self.key)

    @functools.cached_property
    def kinds(self) -> tuple[int, ...]:
        """In the order that the loop knows."""
        m, (keys, values) = self.multiplier, self.activation
        laws = [0 if law is None else _LAWS.index(law.kind) for law in self.laws]
        rule = (0,) * 4 if m is None else (_MULTIPLIERS.index(m.kind), int(m.aware), _SIDES[m.side], m.iterations)
        channel = int(self.gate is not None and self.gate.per_channel)
        path = (_ERASES.index(self.erase), int(self.feedback), _VALUES.index(self.values), _STEPS.index(self.step.rule))
        activations = (_ACTIVATIONS.index(keys), _ACTIVATIONS.index(values), _GATES.index(self.output_gate))
        return (*path, *activations, channel, *laws, *rule)

    @functools.cached_property
    def numbers(self) -> tuple[float, ...]:
        """Its numbers, in the order that the loop knows, but for the first two: the output's scale and the lowest exponent."""
        m = self.multiplier
        eps = [-1.0 if value is None else value for value in (self.eps_q, self.eps_k, self.eps, self.step.eps, self.eps_value)]
        rule = (0.0,) * 6 if m is None else (m.eta, *m.box, m.log_x, m.limit, m.floor)
        ranges = [edge for law in self.laws for edge in ((0.0, 1.0) if law is None else (law.low, law.high))]
        return (*eps, *rule, *ranges)


class Weights(NamedTuple):
    """A layer's tensors, NOTHING or None where it has no such thing.

    mixed: the projection of q, k and v, R = C. taps [W,C]. laws: of gate, step size, forgetting and gain. read, value: of the
    channels' erase and value, R = H K and H V. gate: of the output, R = H V. output: the last projection, of the output (NOTHING:
    the output as it is). norm [V]. centre (the multiplier's), erase (c), feedback (D), gain (g) and skip (D of o + D v, v as it
    is not yet multiplied): [H]. ridge (the multiplier's) [H,K]. later: of the step sizes of the substeps after the first.
    """

    mixed: Product
    taps: Tensor | None = None
    laws: tuple[Product, Product, Product, Product] = (NOTHING,) * 4
    read: Product = NOTHING
    value: Product = NOTHING
    gate: Product = NOTHING
    output: Product = NOTHING
    norm: Tensor | None = None
    centre: Tensor | None = None
    erase: Tensor | None = None
    feedback: Tensor | None = None
    gain: Tensor | None = None
    skip: Tensor | None = None
    ridge: Tensor | None = None
    later: tuple[Product, ...] = ()


class Around(NamedTuple):
    """The block around a layer: y = x + layer(norm(x)), then y + down(silu(g) u), [g, u] = up norm'(y), where `mlp_norm` is no
    None, then the norm that a model ends with, where `next_norm` is none either. Norms [D]; eps: of the first two; up R = 2 F,
    down R = D."""

    norm: Tensor
    eps: float
    mlp_norm: Tensor | None = None
    up: Product = NOTHING
    down: Product = NOTHING
    next_norm: Tensor | None = None
    next_eps: float = 0.0


class Part(NamedTuple):
    """A layer with its tensors, and the block around it, or none."""

    layer: Layer
    weights: Weights
    around: Around | None = None
