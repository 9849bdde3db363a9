"""Decoding on a CPU: one token of every sequence, without gradients, in as few calls as it takes.

B batch, H heads, G heads of q and k, K key width, V value width, D model width, n substeps, C = G K + n (G K + H V) channels, W
taps of the short convolution.

A token's arithmetic takes a fraction of the time of the tensor operations that it is written in: what counts is their number. So
all of a layer is one compiled call, `Token`, for the components of most cards; all layers of a model are, with their norms,
residuals and MLPs. For other components, the recurrence and the norm of its output are one, `step`. Both leave what they are
given unchanged. With gradients, and elsewhere, the kernels for whole sequences compute the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .cpu.decode_layer import NOTHING, Part, Product
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
Carried = tuple[Tensor | None, Tensor | None, Tensor | None]
"""What a layer carries from token to token: the W-1 last inputs of its convolution [B,W-1,C] (None without one), S [B,H,K,V], and
the multiplier's statistic, [B,H,K] or [B,H,K,K] (None without one)."""


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
    """One token of a layer, h = x, or of blocks behind each other, h = norm(x) of what the block before gives:

        (q, k, v) = silu(sum_i w_i * u_{t-i}), u = W h          q / sqrt(|q|^2 + eps_q)      k / sqrt(|k|^2 + eps_k)
        S~ = Diag(a) S      e = v - S~^T r      S' = S~ + beta (m * k) e^T
        o = K^-1/2 S'^T q   o / sqrt(mean(o^2) + eps) * norm    y = W' o

    Of n substeps each has a k, v and beta of its own; a is that of the first, 1 at the others, and o is read after the last.
    Made once for the layers' tensors, whose numbers may change, and move: where they stand is looked up at every token.
    """

    def __init__(self, *parts: Part) -> None:
        self.parts, self.ends = parts, parts[-1].weights.output is not NOTHING
        assert len(parts) == 1 or all(part.around and part.weights.output is not NOTHING for part in parts), "y is the next x"
        slots = [_slots(part) for part in parts]
        self._none = np.zeros((len(parts), _MOVING + max(map(len, slots))), np.int64)
        given = [(i, _MOVING + j, one) for i, own in enumerate(slots) for j, one in enumerate(own) if one is not None]
        self._places = [i for i, _, _ in given], [j for _, j, _ in given]
        self._tensors = [one for _, _, one in given]
        self._shapes = [one.shape for one in self._tensors]
        self._found: tuple[list[int], list[torch.dtype], Any] = ([], [], None)
        self._told: dict[tuple[torch.Size, torch.dtype], _Told] = {}

    def serves(self, x: Tensor, before: Sequence[Carried]) -> bool:
        """Whether these are tensors that it takes: of its layers' shapes, and all of x's dtype."""
        told = self._told.get((x.shape, x.dtype)) or self._tell(x.shape, x.dtype)
        for carried, shapes in zip(before, told.carried, strict=True):
            for one, shape in zip(carried, shapes, strict=True):
                if one is not None and (one.dtype is not x.dtype or not one.is_cpu):
                    return False
                if (None if one is None else one.shape) != shape:
                    return False
        return True

    def __call__(self, x: Tensor, before: Sequence[Carried]) -> tuple[Tensor, list[Carried]]:
        """x: the input [B,1,D]. before: what each layer carries, see `Carried`. They must be as `serves` asks.

        Returns: y [B,1,D] (o [B,1,H V] without a last projection), and what each layer carries on.
        """
        told = self._told.get((x.shape, x.dtype)) or self._tell(x.shape, x.dtype)
        at, _alive = self._addresses(x.dtype)
        x, y = x.contiguous(), x.new_empty(told.output)
        after: list[Carried] = []
        moving = []
        for carried, (past, S, statistic) in zip(before, told.carried, strict=True):
            new = _new(x, past), x.new_empty(S), _new(x, statistic)
            moving.append((x, *[None if one is None else one.contiguous() for one in carried], y, *new))
            after.append(new)
            x = y
        at[:, :_MOVING] = [[0 if one is None else one.data_ptr() for one in row] for row in moving]
        rows = min(_ROWS, -(-len(x) // torch.get_num_threads())) if told.work >= _WORTH_A_THREAD else _ROWS
        _call("token", x.dtype, -(-len(x) // rows), told.work, rows, told.plans, at, told.numbers)
        return y, after

    def _tell(self, shape: torch.Size, dtype: torch.dtype) -> _Told:
        (B, one, D), layer = shape, self.parts[0].layer
        assert one == 1, "one token"
        plans, numbers = [_plan(part, B, D) for part in self.parts], [_own_numbers(part, dtype) for part in self.parts]
        longest = max(map(len, plans))
        told = self._told[shape, dtype] = _Told(
            [_carried(part, B) for part in self.parts],
            torch.Size((B, 1, D if self.ends else layer.heads * layer.value)),
            max(B * part.layer.heads * part.layer.key * part.layer.value for part in self.parts),
            np.array([(*plan, *(0,) * (longest - len(plan))) for plan in plans]),
            np.stack(numbers),
        )
        return told

    def _addresses(self, dtype: torch.dtype) -> tuple[Any, list[Tensor]]:
        """Where the layers' tensors stand (0: there is none), and the copies of what is not contiguous or of another dtype, which
        have to live until the loop has run."""
        tensors, copies = self._tensors, []
        where, dtypes = [tensor.data_ptr() for tensor in tensors], [dtype, *[tensor.dtype for tensor in tensors]]
        if self._found[:2] != (where, dtypes) or not all(map(Tensor.is_contiguous, tensors)):
            assert [tensor.shape for tensor in tensors] == self._shapes, "numbers change, and where they stand, but no sizes"
            assert all(tensor.is_cpu for tensor in tensors), "on the device of x"
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


class _Told(NamedTuple):
    """What is known once the input's shape and dtype are."""

    carried: list[tuple[torch.Size | None, torch.Size, torch.Size | None]]
    """Shapes of what each layer carries."""
    output: torch.Size
    work: int
    plans: Any
    """A row per layer, as `numbers`: see cpu/decode_places.py."""
    numbers: Any


def _products(part: Part) -> tuple[Product, ...]:
    w, around = part.weights, part.around
    up, down = (NOTHING, NOTHING) if around is None else (around.up, around.down)
    assert len(w.later) == part.layer.substeps - 1, "a step of its own for every substep"
    return (w.mixed, *w.laws, w.read, w.value, w.gate, w.output, up, down, *w.later)


def _slots(part: Part) -> list[Tensor | None]:
    """A layer's tensors in the order of their places."""
    w, around = part.weights, part.around
    norms = (None, None, None) if around is None else (around.norm, around.mlp_norm, around.next_norm)
    single = (w.taps, w.norm, w.centre, w.erase, w.feedback, w.gain, w.skip, w.ridge, *norms)
    return [*single, *(tensor for product in _products(part) for tensor in product)]


def _plan(part: Part, B: int, D: int) -> tuple[int, ...]:
    layer, w, products = part.layer, part.weights, _products(part)
    down = NOTHING if part.around is None else part.around.down
    hidden, taps = 0 if down.weight is None else down.weight.shape[1], 1 if w.taps is None else w.taps.shape[0]
    ranks = [0 if product.inner is None else product.inner.shape[0] for product in products]
    return (B, taps, D, *layer.sizes, hidden, int(w.output is not NOTHING), *layer.kinds, *ranks)


def _own_numbers(part: Part, dtype: torch.dtype) -> Any:
    first, rest = part.layer.numbers[:5], part.layer.numbers[5:]
    eps = (0.0, 0.0) if part.around is None else (part.around.eps, part.around.next_eps)
    return _numbers(dtype, part.layer.key**-0.5, lowest_exponent(dtype), *first, *eps, *rest)


def _carried(part: Part, B: int) -> tuple[torch.Size | None, torch.Size, torch.Size | None]:
    layer, taps = part.layer, part.weights.taps
    past = None if taps is None else torch.Size((B, taps.shape[0] - 1, sum(layer.widths)))
    statistic = None if layer.statistic is None else torch.Size((B, *layer.statistic))
    return past, torch.Size((B, layer.heads, layer.key, layer.value)), statistic


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


def _new(like: Tensor, shape: torch.Size | None) -> Tensor | None:
    return None if shape is None else like.new_empty(shape)


def _as_it_lies(tensor: Tensor | None, dtype: torch.dtype) -> Any:
    """Contiguous in `dtype`, without its history."""
    if tensor is None or (tensor.dtype == dtype and tensor.is_contiguous() and not tensor.requires_grad):
        return tensor
    return tensor.detach().to(dtype).contiguous()


@functools.lru_cache(maxsize=256)
def _numbers(dtype: torch.dtype, *numbers: float) -> Any:
    """Numbers as a loop takes them."""
    return torch.tensor(numbers, dtype=dtype).numpy()
