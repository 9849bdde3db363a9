"""Decoding on a CPU: one token of every sequence, without gradients, in as few calls as it takes.

B batch, H heads, G heads of q and k, K key width, V value width, D model width, n substeps, C = G K + n (G K + H V) channels, W
taps of the short convolution.

A token's arithmetic takes a fraction of the time of the tensor operations that it is written in: what counts is their number. So
all of a layer is one compiled call, `Token`, with the norms, the residual and the MLP of its block or without, for the components
of most cards; for others, the recurrence and the norm of its output are one, `step`. Both leave what they are given unchanged.
With gradients, and elsewhere, the kernels for whole sequences compute the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cpu.decode_layer import NOTHING, Around, Layer, Weights
from .cpu.launch import launch
from .precision import lowest_exponent

SMALLEST = 16
"""Head width from which the loops are worth compiling, as those for whole sequences are."""
_MOVING = 8
"""Addresses of what is another at every token; they come first."""
_WORTH_A_THREAD = 1 << 17
"""Numbers of all states together from which a second thread pays."""
FEW = 32
"""Sequences up to which `Token` takes a layer's products as well as torch does."""
_ROWS = 16
"""Sequences that share one pass over a matrix: their inputs stay in the first-level cache."""
_ready: set[tuple[str, torch.dtype]] = set()


def serves(*tensors: Tensor | None) -> bool:
    """Whether a token of these tensors can be decoded here: on a CPU, of one dtype, float32 or float64, with no gradient to
    record (`torch.no_grad`), outside of autocast and of compilation."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    dtype = None
    for tensor in tensors:
        if tensor is not None:
            dtype = dtype or tensor.dtype
            if tensor.dtype is not dtype or not tensor.is_cpu:
                return False
    return dtype is torch.float32 or dtype is torch.float64


class Token:
    """One token of a layer, h = x, or of the block around it, h = norm(x):

        (q, k, v) = silu(sum_i w_i * u_{t-i}), u = W h          q / sqrt(|q|^2 + eps_q)      k / sqrt(|k|^2 + eps_k)
        S~ = Diag(a) S      e = v - S~^T r      S' = S~ + beta (m * k) e^T
        o = K^-1/2 S'^T q   o / sqrt(mean(o^2) + eps) * norm    y = W' o

    Of n substeps each has a k, v and beta of its own; a is that of the first, 1 at the others, and o is read after the last.
    Made once for the layer's tensors, whose numbers may change, and move: where they stand is looked up at every token.
    """

    def __init__(self, layer: Layer, weights: Weights, around: Around | None = None) -> None:
        w, up, down, self._eps = weights, NOTHING, NOTHING, 0.0
        norms: tuple[Tensor | None, Tensor | None] = (None, None)
        if around is not None:
            up, down, norms, self._eps = around.up, around.down, (around.norm, around.mlp_norm), around.eps
        products = (w.mixed, *w.laws, w.read, w.value, w.gate, w.output, up, down, *w.later)
        single = (w.taps, w.norm, w.centre, w.erase, w.feedback, w.gain, w.skip, w.ridge, *norms)
        assert len(w.later) == layer.substeps - 1, "a step of its own for every substep"
        slots = (*single, *(tensor for product in products for tensor in product))
        self.layer, self.ends = layer, w.output is not NOTHING
        self._tensors = [tensor for tensor in slots if tensor is not None]
        self._shapes = [tensor.shape for tensor in self._tensors]
        self._places = [_MOVING + i for i, tensor in enumerate(slots) if tensor is not None]
        self._none = np.zeros(_MOVING + len(slots), np.int64)
        self._taps = 0 if w.taps is None else w.taps.shape[0]
        hidden = 0 if down.weight is None else down.weight.shape[1]
        ranks = [0 if product.inner is None else product.inner.shape[0] for product in products]
        self._plan = (*layer.sizes, hidden, int(self.ends), *layer.kinds, *ranks)
        self._found: tuple[list[int], list[torch.dtype], Any] = ([], [], None)
        self._told: dict[tuple[int, torch.dtype], tuple[Any, Any]] = {}

    def __call__(
        self, x: Tensor, past: Tensor | None, state: Tensor, statistic: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """x: the input [B,1,D]. past: the W-1 inputs of the convolution before this one [B,W-1,C], None without one. state: S
        [B,H,K,V]. statistic: the multiplier's, [B,H,K] or [B,H,K,K]. All of one dtype, see `serves`.

        Returns: y [B,1,D] (o [B,1,H V] without a last projection), the last W-1 inputs, S' and the multiplier's next statistic.
        """
        (B, H, K, V), dtype, D, layer, taps = state.shape, state.dtype, x.shape[2], self.layer, self._taps
        assert (layer.heads, layer.key, layer.value) == (H, K, V) and x.shape[:2] == (B, 1), "one token, heads of these widths"
        assert (past is None) == (not taps) and (past is None or past.shape == (B, taps - 1, sum(layer.widths))), "convolved"
        remembers = layer.statistic
        assert (None if statistic is None else statistic.shape) == (None if remembers is None else (B, *remembers)), (
            "what a multiplier remembers"
        )
        y, new = x.new_empty(B, 1, D if self.ends else H * V), state.new_empty(B, H, K, V)
        kept = None if past is None else past.new_empty(past.shape)
        after = None if statistic is None else statistic.new_empty(statistic.shape)
        at, _alive = self._addresses(dtype)
        given = [None if tensor is None else _as_it_lies(tensor, dtype) for tensor in (x, past, state, statistic)]
        made = (y, kept, new, after)
        at[:_MOVING] = [0 if tensor is None else tensor.data_ptr() for tensor in (*given, *made)]
        work = B * H * K * V
        rows = min(_ROWS, -(-B // torch.get_num_threads())) if work >= _WORTH_A_THREAD else _ROWS
        plan, numbers = self._told.get((B, dtype)) or self._tell(B, D, dtype)
        _call("token", dtype, -(-B // rows), work, rows, plan, at, numbers)
        return y, kept, new, after

    def _tell(self, B: int, D: int, dtype: torch.dtype) -> tuple[Any, Any]:
        """Sizes and kinds, and numbers, for a batch of B."""
        first, rest, scale = self.layer.numbers[:5], self.layer.numbers[5:], self.layer.key**-0.5
        plan = _integers(B, max(self._taps, 1), D, *self._plan)
        self._told[B, dtype] = plan, _numbers(dtype, scale, lowest_exponent(dtype), *first, self._eps, *rest)
        return self._told[B, dtype]

    def _addresses(self, dtype: torch.dtype) -> tuple[Any, list[Tensor]]:
        """Where the layer's tensors stand (0: there is none), and the copies of what is not contiguous or of another dtype, which
        have to live until the loop has run."""
        tensors, copies = self._tensors, []
        where, dtypes = [tensor.data_ptr() for tensor in tensors], [dtype, *(tensor.dtype for tensor in tensors)]
        if self._found[:2] != (where, dtypes) or not all(tensor.is_contiguous() for tensor in tensors):
            assert [tensor.shape for tensor in tensors] == self._shapes, "numbers change, and where they stand, but no sizes"
            for i, tensor in enumerate(tensors):
                if tensor.dtype != dtype or not tensor.is_contiguous():
                    copies.append(tensor.to(dtype).contiguous())
                    where[i] = copies[-1].data_ptr()
            at = self._none.copy()
            at[self._places] = where
            if copies:
                return at, copies
            self._found = where, dtypes, at
        return self._found[2].copy(), copies


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

    loop: Callable[..., None] = getattr(compiled_decode, name)()
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
