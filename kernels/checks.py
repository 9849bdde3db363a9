"""What the kernels accept. Every message names the argument, what it holds and what it should hold."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from ..errors import UserError, shown, unknown
from .packing import packing_of

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CLIPS = ("token", "chunk", "none")


def check_delta_rule(
    q: Tensor,
    read_key: Tensor | None,
    write_key: Tensor | None,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float | None,
    erase: bool,
    chunk_size: int,
    cu_seqlens: Tensor | None = None,
    beta: Tensor | None = None,
) -> None:
    """Raises `UserError` (a ValueError) for the first argument of `delta_rule` that cannot be used."""
    B, T, H, K = _leading("q", q, "[B,T,H,K]")
    N, legend = _sequences(cu_seqlens, B, T)
    if beta is None:
        _like("write_key", write_key, q, "q", "[B,T,H,K]", (B, T, H, K))
    else:
        _per_token("beta", beta, q, "q", (B, T, H))
        if write_key is not None:
            raise UserError("write_key: expected None beside beta, which says that the write key is beta times the read key")
        _like("read_key", read_key, q, "q", "[B,T,H,K]", (B, T, H, K))
    _floating("v", v)
    width = v.shape[-1] if v.ndim == 4 else 0
    _like("v", v, q, "q", "[B,T,H,V]", (B, T, H, width if width else "V >= 1"))
    if not isinstance(erase, bool):
        raise UserError(f"erase: expected True or False, got {erase!r}")
    if erase and read_key is None:
        raise UserError(f"read_key: expected shape [B,T,H,K] = {_show((B, T, H, K))}, got None; only erase=False does without it")
    if erase and read_key is not None:
        _like("read_key", read_key, q, "q", "[B,T,H,K]", (B, T, H, K))
    if log_decay is not None:
        _decay("log_decay", log_decay, q, (B, T, H), K)
    if initial_state is not None:
        _shaped("initial_state", initial_state, f"[{legend},H,K,V]", (N, H, K, v.shape[-1]))
        _placed("initial_state", initial_state, q, "q")
    if scale is not None:
        _number("scale", scale)
    check_chunk_size(chunk_size)


def check_diagonal_scan(
    u: Tensor,
    log_decay: Tensor | None,
    initial: Tensor | None,
    anchor: Tensor | float | None,
    chunk_size: int,
    cu_seqlens: Tensor | None = None,
) -> None:
    """Raises `UserError` for the first argument of `diagonal_scan` that cannot be used."""
    B, T, H, K = _leading("u", u, "[B,T,H,K]")
    N, legend = _sequences(cu_seqlens, B, T)
    if log_decay is not None:
        _per_token("log_decay", log_decay, u, "u", (B, T, H))
    if initial is not None:
        _shaped("initial", initial, f"[{legend},H,K]", (N, H, K))
        _placed("initial", initial, u, "u")
    _anchor(anchor, u, "u", (N, H, K), legend)
    check_chunk_size(chunk_size)


def check_write_key(
    key: Tensor,
    centre: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    gain: Tensor | None,
    initial: Tensor | None,
    chunk_size: int,
    cu_seqlens: Tensor | None,
) -> None:
    """Raises `UserError` for the first argument of `preconditioned_write_key` that cannot be used."""
    B, T, H, K = _leading("key", key, "[B,T,H,K]")
    N, legend = _sequences(cu_seqlens, B, T)
    _shaped("centre", centre, "[H]", (H,))
    _placed("centre", centre, key, "key")
    for name, tensor in (("beta", beta), ("log_decay", log_decay), ("gain", gain)):
        if tensor is not None:
            _per_token(name, tensor, key, "key", (B, T, H))
    if initial is not None:
        _shaped("initial", initial, f"[{legend},H,K]", (N, H, K))
        _placed("initial", initial, key, "key")
    check_chunk_size(chunk_size)


def check_hypergradient_scan(
    s: Tensor,
    step: Tensor | float,
    aware: Tensor | None,
    log_decay: Tensor | None,
    initial: Tensor | None,
    box: tuple[float, float] | None,
    clip: str,
    anchor: Tensor | float | None,
    chunk_size: int,
    cu_seqlens: Tensor | None = None,
    leading: str = "s",
) -> None:
    """Raises `UserError` for the first argument of `hypergradient_scan` that cannot be used. `leading`: how s is called."""
    B, T, H, K = _leading(leading, s, "[B,T,H,K]")
    N, legend = _sequences(cu_seqlens, B, T)
    if isinstance(step, Tensor):
        _per_token("step", step, s, leading, (B, T, H))
    else:
        _number("step", step, instead="or a tensor [B,T,H]")
    for name, tensor in (("aware", aware), ("log_decay", log_decay)):
        if tensor is not None:
            _per_token(name, tensor, s, leading, (B, T, H))
    if initial is not None:
        _shaped("initial", initial, f"[{legend},H,K]", (N, H, K))
        _placed("initial", initial, s, leading)
    if box is not None:
        _box(box)
    if clip not in CLIPS:
        raise unknown("clip", clip, CLIPS, "clip")
    _anchor(anchor, s, leading, (N, H, K), legend)
    check_chunk_size(chunk_size)


def check_hypergradient_write_key(
    key: Tensor,
    step: Tensor | float,
    beta: Tensor | None,
    aware: Tensor | None,
    log_decay: Tensor | None,
    initial: Tensor | None,
    box: tuple[float, float] | None,
    clip: str,
    anchor: Tensor | float | None,
    chunk_size: int,
    cu_seqlens: Tensor | None,
) -> None:
    """Raises `UserError` for the first argument of `hypergradient_write_key` that cannot be used."""
    check_hypergradient_scan(key, step, aware, log_decay, initial, box, clip, anchor, chunk_size, cu_seqlens, leading="key")
    if beta is not None:
        B, T, H, _ = key.shape
        _per_token("beta", beta, key, "key", (B, T, H))


def check_inverse_gram_scan(
    key: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    initial: Tensor | None,
    before: Tensor | None,
    after: Tensor | None,
    limit: float,
    chunk_size: int,
) -> None:
    """Raises `UserError` for the first argument of `inverse_gram_scan` that cannot be used."""
    B, T, H, K = _leading("key", key, "[B,T,H,K]")
    _gram(key, "key", beta, log_decay, (B, T, H))
    if initial is None:
        raise UserError(f"initial: expected P_0 of shape [B,H,K,K] = {_show((B, H, K, K))}, positive definite, got None")
    _shaped("initial", initial, "[B,H,K,K]", (B, H, K, K))
    _placed("initial", initial, key, "key")
    for name, rows in (("before", before), ("after", after)):
        if rows is not None:
            _like(name, rows, key, "key", "[B,T,H,K]", (B, T, H, K))
    if isinstance(limit, bool) or not isinstance(limit, Real) or not float(limit) > 0:
        raise UserError(f"limit: expected a number over 0, the largest mean diagonal of P, got {limit!r}")
    check_chunk_size(chunk_size)


def check_gram_solve(
    q: Tensor,
    key: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    ridge: Tensor,
    initial: Tensor | None,
    iterations: int,
    chunk_size: int,
) -> None:
    """Raises `UserError` for the first argument of `gram_solve` that cannot be used."""
    B, T, H, K = _leading("q", q, "[B,T,H,K]")
    _like("key", key, q, "q", "[B,T,H,K]", (B, T, H, K))
    _gram(q, "q", beta, log_decay, (B, T, H))
    _shaped("ridge", ridge, "[H,K]", (H, K))
    _placed("ridge", ridge, q, "q")
    if initial is not None:
        _shaped("initial", initial, "[B,H,K,K]", (B, H, K, K))
        _placed("initial", initial, q, "q")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise UserError(f"iterations: expected a whole number of at least 1, got {iterations!r}")
    check_chunk_size(chunk_size)


def check_packing(cu_seqlens: Tensor, B: int, T: int) -> int:
    """Raises `UserError` unless `cu_seqlens` cuts T tokens of a batch of 1 into sequences; returns how many."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.ndim != 1:
        found = f"{cu_seqlens.dtype} {_show(cu_seqlens.shape)}" if isinstance(cu_seqlens, Tensor) else shown(cu_seqlens)
        raise UserError(f"cu_seqlens: expected an int32 or int64 tensor [N+1] of cumulative lengths, got {found}")
    if len(cu_seqlens) < 2:
        raise UserError(f"cu_seqlens: expected [N+1] numbers with N at least 1, got {_show(cu_seqlens.shape)}")
    if B != 1:
        raise UserError(f"cu_seqlens: packed sequences stand one after another in a batch of 1, got B = {B}")
    starts = packing_of(cu_seqlens).starts
    if starts[0] != 0:
        raise UserError(f"cu_seqlens: expected to start at 0, got {starts[0]}")
    for place, (before, after) in enumerate(itertools.pairwise(starts), start=1):
        if after < before:
            raise UserError(f"cu_seqlens[{place}]: cumulative lengths never decrease, got {after} after {before}")
    if starts[-1] != T:
        raise UserError(f"cu_seqlens: expected to end at T = {T}, the number of tokens, got {starts[-1]}")
    return len(starts) - 1


def _sequences(cu_seqlens: Tensor | None, B: int, T: int) -> tuple[int, str]:
    """How many sequences there are, one per batch row or packed, and how a shape's legend calls that."""
    return (B, "B") if cu_seqlens is None else (check_packing(cu_seqlens, B, T), "N")


def check_chunk_size(chunk_size: int) -> None:
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise UserError(f"chunk_size: expected a whole number of at least 1, got {chunk_size!r}")


def _show(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(str(size) for size in shape)}]"


def _floating(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise UserError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        valid = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
        raise UserError(f"{name}: expected a floating dtype ({valid}), got {str(tensor.dtype).removeprefix('torch.')}")


def _shaped(name: str, tensor: object, legend: str, shape: Sequence[int | str]) -> None:
    """A floating tensor of exactly this shape."""
    _floating(name, tensor)
    assert isinstance(tensor, Tensor)
    if tuple(tensor.shape) != tuple(shape):
        raise UserError(f"{name}: expected shape {legend} = {_show(shape)}, got {_show(tensor.shape)}")


def _leading(name: str, tensor: object, legend: str) -> tuple[int, int, int, int]:
    """The sizes of the tensor that the others are measured against; only time may be empty."""
    _floating(name, tensor)
    assert isinstance(tensor, Tensor)
    if tensor.ndim != 4:
        raise UserError(f"{name}: expected shape {legend} (4 dimensions), got {_show(tensor.shape)}")
    B, T, H, K = tensor.shape
    if 0 in (B, H, K):
        raise UserError(f"{name}: expected shape {legend} with B, H and K at least 1, got {_show(tensor.shape)}")
    return B, T, H, K


def _placed(name: str, tensor: Tensor, like: Tensor, of: str) -> None:
    if tensor.device != like.device:
        raise UserError(f"{name}: expected device {like.device} (that of {of}), got {tensor.device}")


def _like(name: str, tensor: object, like: Tensor, of: str, legend: str, shape: Sequence[int | str]) -> None:
    """A tensor of this shape with the leading tensor's dtype and device."""
    _shaped(name, tensor, legend, shape)
    assert isinstance(tensor, Tensor)
    if tensor.dtype != like.dtype:
        raise UserError(f"{name}: expected dtype {like.dtype} (that of {of}), got {tensor.dtype}")
    _placed(name, tensor, like, of)


def _per_token(name: str, tensor: object, like: Tensor, of: str, shape: tuple[int, int, int]) -> None:
    """One number per token and head; its dtype is its own (gates are often kept in float32 beside bfloat16 keys)."""
    _shaped(name, tensor, "[B,T,H]", shape)
    assert isinstance(tensor, Tensor)
    _placed(name, tensor, like, of)


def _gram(like: Tensor, of: str, beta: Tensor | None, log_decay: Tensor | None, shape: tuple[int, int, int]) -> None:
    """The weights of a Gram matrix's recurrence."""
    for name, tensor in (("beta", beta), ("log_decay", log_decay)):
        if tensor is not None:
            _per_token(name, tensor, like, of, shape)


def _anchor(anchor: Tensor | float | None, like: Tensor, of: str, shape: tuple[int, int, int], legend: str) -> None:
    if isinstance(anchor, Tensor):
        _shaped("anchor", anchor, f"[{legend},H,K]", shape)
        _placed("anchor", anchor, like, of)
    elif anchor is not None:
        _number("anchor", anchor, instead=f"or a tensor [{legend},H,K] or None")


def _decay(name: str, tensor: object, like: Tensor, shape: tuple[int, int, int], K: int) -> None:
    _floating(name, tensor)
    assert isinstance(tensor, Tensor)
    if tuple(tensor.shape) not in (shape, (*shape, K)):
        scalar, channel = _show(shape), _show((*shape, K))
        raise UserError(f"{name}: expected shape [B,T,H] = {scalar} or [B,T,H,K] = {channel}, got {_show(tensor.shape)}")
    _placed(name, tensor, like, "q")


def _number(name: str, value: object, instead: str = "or None") -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(float(value)):
        raise UserError(f"{name}: expected a finite number {instead}, got {value!r}")


def _box(box: object) -> None:
    if not isinstance(box, tuple | list) or len(box) != 2 or not all(isinstance(edge, Real) for edge in box):
        raise UserError(f"box: expected (lowest, highest) or None, got {box!r}")
    lowest, highest = float(box[0]), float(box[1])
    if not lowest <= highest:
        raise UserError(f"box: expected lowest <= highest, got ({lowest}, {highest})")
