"""What the kernels accept. Every message names the argument, what it holds and what it should hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from ..errors import UserError, unknown

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CLIPS = ("token", "chunk", "none")


def check_delta_rule(
    q: Tensor,
    read_key: Tensor | None,
    write_key: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float | None,
    erase: bool,
    chunk_size: int,
) -> None:
    """Raises `UserError` (a ValueError) for the first argument of `delta_rule` that cannot be used."""
    B, T, H, K = _leading("q", q, "[B,T,H,K]")
    _like("write_key", write_key, q, "q", "[B,T,H,K]", (B, T, H, K))
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
        _shaped("initial_state", initial_state, "[B,H,K,V]", (B, H, K, v.shape[-1]))
        _placed("initial_state", initial_state, q, "q")
    if scale is not None:
        _number("scale", scale)
    check_chunk_size(chunk_size)


def check_diagonal_scan(
    u: Tensor, log_decay: Tensor | None, initial: Tensor | None, anchor: Tensor | float | None, chunk_size: int
) -> None:
    """Raises `UserError` for the first argument of `diagonal_scan` that cannot be used."""
    B, T, H, K = _leading("u", u, "[B,T,H,K]")
    if log_decay is not None:
        _per_token("log_decay", log_decay, u, "u", (B, T, H))
    if initial is not None:
        _shaped("initial", initial, "[B,H,K]", (B, H, K))
        _placed("initial", initial, u, "u")
    _anchor(anchor, u, "u", (B, H, K))
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
) -> None:
    """Raises `UserError` for the first argument of `hypergradient_scan` that cannot be used."""
    B, T, H, K = _leading("s", s, "[B,T,H,K]")
    if isinstance(step, Tensor):
        _per_token("step", step, s, "s", (B, T, H))
    else:
        _number("step", step, instead="or a tensor [B,T,H]")
    for name, tensor in (("aware", aware), ("log_decay", log_decay)):
        if tensor is not None:
            _per_token(name, tensor, s, "s", (B, T, H))
    if initial is not None:
        _shaped("initial", initial, "[B,H,K]", (B, H, K))
        _placed("initial", initial, s, "s")
    if box is not None:
        _box(box)
    if clip not in CLIPS:
        raise unknown("clip", clip, CLIPS, "clip")
    _anchor(anchor, s, "s", (B, H, K))
    check_chunk_size(chunk_size)


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


def _anchor(anchor: Tensor | float | None, like: Tensor, of: str, shape: tuple[int, int, int]) -> None:
    if isinstance(anchor, Tensor):
        _shaped("anchor", anchor, "[B,H,K]", shape)
        _placed("anchor", anchor, like, of)
    elif anchor is not None:
        _number("anchor", anchor, instead="or a tensor [B,H,K] or None")


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
