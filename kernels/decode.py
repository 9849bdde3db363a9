"""Decoding on a CPU: one token of every sequence, without gradients, in as few calls as it takes.

B batch, H heads, K key width, V value width, D model width, C = 2 H K + H V channels, W taps of the short convolution.

A token's arithmetic takes a fraction of the time of the tensor operations that it is written in: what counts is their number. So
all of a layer between its projections is one compiled call, `token`, for the laws and preconditioners of most cards; for other
components, the recurrence and the norm of its output are one, `step`. Both leave what they are given unchanged. With gradients,
and elsewhere, the kernels for whole sequences compute the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .cpu.launch import launch
from .precision import lowest_exponent

SMALLEST = 16
"""Head width from which the loops are worth compiling, as those for whole sequences are."""
_WORTH_A_THREAD = 1 << 17
"""Numbers of all states together from which a second thread pays."""
_LAWS = ("", "softplus", "bounded", "sigmoid", "log_sigmoid")
_MULTIPLIERS = ("", "diagonal", "hypergradient")
_SIDES = {"write": 1, "query": 2, "both": 3}
_ready: set[tuple[str, torch.dtype]] = set()


class Law(NamedTuple):
    """How a component's number y follows from its projection z [B,1,R], with R = H, or H K (`per_channel`: one per key channel):

    softplus     y = -exp(A_log) softplus(z + bias)          A_log [H], at most 64
    bounded      y = low sigmoid(exp(A_log) (z + bias))
    sigmoid      y = low + (high - low) sigmoid(z + bias)
    log_sigmoid  y = log sigmoid(z + bias) / high
    """

    kind: Literal["softplus", "bounded", "sigmoid", "log_sigmoid"]
    low: float = 0.0
    high: float = 1.0
    per_channel: bool = False


class Terms(NamedTuple):
    """A law's tensors: z itself, or the `weight` [R,D] of z = W x; bias [R] (None: 0) and A_log [H], where the law has one."""

    z: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    A_log: Tensor | None = None


class Multiplier(NamedTuple):
    """A preconditioner that multiplies: m on the write key, the query, or both, from a statistic A [B,H,K].

        diagonal        A' = gamma A + gain k^2    m = exp(-log_x s(log(A' + 1e-6) - centre)),  s(r) = r / (1 + |r|), centre [H]
        hypergradient   m = A    A' = clip(gamma A + eta gain b (1 - b <A, k^2>) k^2, box)       b = beta if `aware`, else 1

    gamma = exp(y) by the law `forget`, 1 without it; gain by its law, 1 without it.
    """

    kind: Literal["diagonal", "hypergradient"]
    side: str = "write"
    forget: Law | None = None
    gain: Law | None = None
    log_x: float = 0.0
    eta: float = 0.0
    aware: bool = False
    box: tuple[float, float] = (-float("inf"), float("inf"))


@dataclass(frozen=True, eq=False)
class Layer:
    """What of a layer's tokens does not change.

    gate: the law of log a (None: a = 1). step_size: that of beta (None: 1). erase False: e = v. eps_q, eps_k: what is added to
    |q|^2 and |k|^2 before q and k are divided by their norms (None: they are not); eps: to the mean square of the output.
    """

    heads: int
    key: int
    value: int
    gate: Law | None = None
    step_size: Law | None = None
    multiplier: Multiplier | None = None
    erase: bool = True
    eps_q: float | None = 1e-6
    eps_k: float | None = 1e-6
    eps: float = 1e-5

    @functools.cached_property
    def plan(self) -> tuple[int, ...]:
        """Its sizes and kinds, in the order that the loop knows."""
        m = self.multiplier
        kinds = [0 if law is None else _LAWS.index(law.kind) for law in self.laws]
        rule = (0, 0, 0) if m is None else (_MULTIPLIERS.index(m.kind), int(m.aware), _SIDES[m.side])
        channel = int(self.gate is not None and self.gate.per_channel)
        return (self.heads, self.key, self.value, int(self.erase), channel, *kinds, *rule)

    @functools.cached_property
    def laws(self) -> tuple[Law | None, ...]:
        m = self.multiplier
        return (self.gate, self.step_size, None if m is None else m.forget, None if m is None else m.gain)

    @functools.cached_property
    def numbers(self) -> tuple[float, ...]:
        """Its numbers, in the order that the loop knows, but for the first two: the output's scale and the lowest exponent."""
        m = self.multiplier
        eps = [-1.0 if value is None else value for value in (self.eps_q, self.eps_k, self.eps)]
        rule = (0.0, 0.0, 0.0, 0.0) if m is None else (m.eta, *m.box, m.log_x)
        ranges = [edge for law in self.laws for edge in ((0.0, 1.0) if law is None else (law.low, law.high))]
        return (*eps, *rule, *ranges)


def serves(*tensors: Tensor | None) -> bool:
    """Whether a token of these tensors can be decoded here: on a CPU, of one dtype, float32 or float64, with no gradient to
    record (`torch.no_grad`), outside of autocast and of compilation."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    dtype: torch.dtype | None = None
    for tensor in tensors:
        if tensor is not None:
            if not tensor.is_cpu or tensor.dtype != (dtype or tensor.dtype):
                return False
            dtype = tensor.dtype
    return dtype in (torch.float32, torch.float64)


def token(
    layer: Layer,
    x: Tensor,
    mixed: Tensor,
    past: Tensor,
    weight: Tensor,
    state: Tensor,
    laws: Sequence[Terms],
    norm: Tensor | None = None,
    statistic: Tensor | None = None,
    centre: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One token of a layer, from the projection of q, k and v to the normalised output:

        (q, k, v) = silu(sum_i w_i * u_{t-i})       q / sqrt(|q|^2 + eps_q)      k / sqrt(|k|^2 + eps_k)
        S~ = Diag(a) S      e = v - S~^T k      S' = S~ + beta (m * k) e^T
        o = K^-1/2 S'^T q   o / sqrt(mean(o^2) + eps) * norm

    Args:
        x: the layer's input [B,1,D]. mixed: its projection u_t [B,1,C]. past: those before it [B,W-1,C]. weight: w [W,C].
        state: S [B,H,K,V]. laws: the terms of gate, step size, forgetting and gain, empty ones where the layer has no such law.
        norm: [V], or None: o as it is. statistic [B,H,K] and centre [H]: the multiplier's. All of one dtype, see `serves`.

    Returns: o [B,1,H V], the last W-1 inputs, S' and the multiplier's next statistic.
    """
    (B, H, K, V), dtype, C = state.shape, state.dtype, mixed.shape[2]
    assert layer.plan[:3] == (H, K, V), "heads of the layer's widths"
    assert C == (2 * K + V) * H, "q, k and v of all heads"
    assert mixed.shape[:2] == x.shape[:2] == (B, 1) and past.shape == (B, weight.shape[0] - 1, C), (
        "one token, and those before it"
    )
    o, kept, new = mixed.new_empty(B, 1, H * V), past.new_empty(past.shape), state.new_empty(B, H, K, V)
    after = None if statistic is None else statistic.new_empty(B, H, K)
    given = [x, mixed, past, weight, kept, state, new, o, norm, statistic, after, centre]
    for terms in laws:
        given += terms
    # Copies of what is not contiguous, or of another dtype, have to live until the loop has run.
    at, copies = [], []
    for tensor in given:
        if tensor is None:
            at.append(0)
            continue
        if tensor.dtype != dtype or not tensor.is_contiguous():
            tensor = tensor.to(dtype).contiguous()
            copies.append(tensor)
        at.append(tensor.data_ptr())
    plan = _integers(B, weight.shape[0], x.shape[2], *layer.plan)
    numbers = _numbers(dtype, K**-0.5, lowest_exponent(dtype), *layer.numbers)
    _call("token", dtype, B, B * H * K * V, plan, np.array(at), numbers)
    return o, kept, new, after


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, for a few rows [...,D], see `serves`."""
    y = x.new_empty(x.shape)
    rows, scale = _as_it_lies(x, x.dtype), _as_it_lies(weight, x.dtype)
    at = np.array((rows.data_ptr(), scale.data_ptr(), y.data_ptr()))
    _call("rms_norm", x.dtype, 1, 0, x.numel() // x.shape[-1], x.shape[-1], at, _numbers(x.dtype, eps))
    return y


def step(
    q: Tensor,
    read_key: Tensor | None,
    write_key: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    scale: float | None = None,
    gain: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """`delta_rule` for one token, and the norm of its output.

        S~ = Diag(exp(log_decay)) S     e = v - S~^T r     S' = S~ + w e^T
        o = scale S'^T q                o / sqrt(mean(o^2) + eps) * gain

    Args:
        q, read_key, write_key: [B,1,H,K]; `read_key` None: nothing is erased, e = v. v: [B,1,H,V].
        log_decay: None, [B,1,H] or [B,1,H,K]. state: S [B,H,K,V].
        scale: K**-0.5 when None. gain: [V], or None: o as it is.

    Returns: o [B,1,H,V] and S', in the dtype of `state`, see `serves`.
    """
    (B, H, K, V), dtype = state.shape, state.dtype
    o, new = v.new_empty(B, 1, H, V, dtype=dtype), state.new_empty(B, H, K, V)
    numbers = _numbers(dtype, K**-0.5 if scale is None else scale, lowest_exponent(dtype), 0.0, 0.0, eps)
    given = [
        torch.empty(shape, dtype=dtype).numpy() if x is None else _as_it_lies(x, dtype).numpy()
        for x, shape in ((q, 0), (read_key, (0, 1, 1, 1)), (write_key, 0), (v, 0), (log_decay, 0), (state, 0), (gain, 0))
    ]
    given[4] = given[4].reshape(B, H, -1)
    _call("step", dtype, B * H, B * H * K * V, *given, numbers, o.view(B, H, V).numpy(), new.numpy())
    return o, new


def _call(name: str, dtype: torch.dtype, units: int, work: int, *given: Any) -> None:
    """The loop `name`, over threads where there is enough to do. A serial loop needs `launch` for the word to the user alone."""
    if units > 1 and work >= _WORTH_A_THREAD and torch.get_num_threads() > 1:
        with launch(f"decoding's {name} over threads", (dtype,), work):
            _loop(f"{name}_threaded")(*given)
    elif (name, dtype) in _ready:
        _loop(name)(*given)
    else:
        with launch(f"decoding's {name}", (dtype,), 0):
            _loop(name)(*given)
        _ready.add((name, dtype))


@functools.cache
def _loop(name: str) -> Callable[..., None]:
    from .cpu import compiled_decode

    loop: Callable[..., None] = getattr(compiled_decode, name)
    return loop


def _as_it_lies(tensor: Tensor | None, dtype: torch.dtype) -> Any:
    """Contiguous in `dtype`, without its history."""
    if tensor is None or (tensor.dtype == dtype and tensor.is_contiguous() and not tensor.requires_grad):
        return tensor
    return tensor.detach().to(dtype).contiguous()


@functools.lru_cache(maxsize=256)
def _integers(*numbers: int) -> Any:
    """Sizes and kinds as a loop takes them."""
    return np.array(numbers)


@functools.lru_cache(maxsize=256)
def _numbers(dtype: torch.dtype, *numbers: float) -> Any:
    """Numbers as a loop takes them."""
    return torch.tensor(numbers, dtype=dtype).numpy()
