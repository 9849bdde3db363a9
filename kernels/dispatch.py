"""The public functions of this floor: inputs checked, the backend chosen (`backends.py`), the call handed on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..errors import UserError
from . import chunked, conjugate, cpu, fla, inverse_gram, reference, scans, token_scan, triton
from .backends import HALF_PRECISION, resolve_backend
from .checks import (
    check_delta_rule,
    check_diagonal_scan,
    check_gram_solve,
    check_hypergradient_scan,
    check_inverse_gram_scan,
)
from .packing import Call, Packing, Tensors, in_batches, one_by_one, packing_of
from .precision import product_dtype, without_autocast, working_dtype

_WORTH_A_LOOP = 1 << 20
"""Numbers of all states together from which the compiled loop is faster for a single token."""
_SMALLEST_SCAN = 16
"""Key width from which a scan is worth compiling, as `delta_rule` is."""


def delta_rule(
    q: Tensor,
    read_key: Tensor | None,
    write_key: Tensor | None,
    v: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    scale: float | None = None,
    erase: bool = True,
    backend: str = "auto",
    chunk_size: int = 64,
    cu_seqlens: Tensor | None = None,
    beta: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The general recurrence that every card is a choice of (a, r, w, v, q) in  [recurrences.md, section 1].

        S~  = Diag(exp(log_decay_t)) S_{t-1}
        e_t = v_t - S~^T r_t              (e_t = v_t without erase)
        S_t = S~ + w_t e_t^T              w: the write key, already times the step size
        o_t = scale S_t^T q_t

    Args:
        q, read_key, write_key: [B,T,H,K]. `read_key` is ignored, and may be None, when `erase` is False.
        v: [B,T,H,V], in the dtype and on the device of q.
        log_decay: None (nothing is forgotten), [B,T,H] (one decay per head) or [B,T,H,K] (one per key channel); -inf resets.
        initial_state: [B,H,K,V], zeros when None.
        scale: factor of the output, K**-0.5 when None.
        erase: subtract what the memory already holds for `read_key` before writing (the delta rule).
        backend: "auto", "reference" (the definition), "torch" (chunk form), "cpu" (compiled token loop), "triton" (GPU
            kernels) or "fla" (flash-linear-attention's, with `beta` or without erase): the same function, up to rounding.
        chunk_size: tokens a chunk at most; matters for speed only.
        cu_seqlens: int32 or int64 [N+1], N sequences packed into a batch of 1: sequence i is the tokens cu_seqlens[i] to
            cu_seqlens[i+1], each with its own state; initial_state and the final state are [N,H,K,V]. Its numbers are read
            from the device once per tensor: hand the same tensor to every layer.
        beta: [B,T,H], in the place of `write_key`, which is None then: the write key is beta times the read key.

    Returns: o [B,T,H,V] in v's dtype, and the state after the last token [B,H,K,V] in the working dtype: the widest dtype of
    q, log_decay and initial_state, float32 at least (under autocast too). Given to the next call, it continues the sequence.
    T = 0 gives an empty o and the initial state. Differentiable once in every tensor.

    Under autocast the GPU backends "triton" and "fla" take q, keys and v in its precision, as torch's own products do, and
    return o in it; sums, states and decays stay in the working dtype. The other backends leave autocast.

    Errors: `UserError` (a ValueError) that names the argument, what it holds and what it should hold.
    """
    check_delta_rule(q, read_key, write_key, v, log_decay, initial_state, scale, erase, chunk_size, cu_seqlens, beta)
    gate = "none" if log_decay is None else "scalar" if log_decay.ndim == 3 else "channel"
    dtype, operand = working_dtype(q, log_decay, initial_state), product_dtype(q.dtype, q.device)
    backend = resolve_backend(backend, q.device, q.shape[-1], v.shape[-1], gate, operand if dtype == torch.float32 else dtype)
    if backend in HALF_PRECISION:
        q, v, read_key, write_key = q.to(operand), v.to(operand), _to(read_key, operand), _to(write_key, operand)
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    rows = read_key if erase else None
    packing = None if cu_seqlens is None else packing_of(cu_seqlens)
    if backend == "fla" and q.shape[1]:
        write = None if rows is not None else _written(write_key, read_key, beta)
        return fla.delta_rule(q, rows, write, beta, v, log_decay, initial_state, factor, dtype, cu_seqlens)
    # One token of a small batch, as in decoding, is one step of the definition: less than the calls around a compiled loop, and a
    # third of the time of a chunk of one.
    single = q.shape[1] == 1
    if backend == "cpu" and packing is None and not (single and q.numel() * v.shape[-1] < _WORTH_A_LOOP):
        key = write_key if beta is None else read_key
        assert key is not None, "check_delta_rule"
        return cpu.delta_rule(q, rows, key, beta, v, log_decay, initial_state, factor, dtype)
    write_key = _written(write_key, read_key, beta)
    if packing is not None and backend != "triton":
        call = partial(delta_rule, scale=factor, erase=erase, backend=backend, chunk_size=chunk_size)
        tokens = {"q": q, "read_key": rows, "write_key": write_key, "v": v, "log_decay": log_decay}
        return in_pieces(call, tokens, {"initial_state": initial_state}, packing, backend)
    if backend == "triton":
        check_working_dtype(dtype)
        return triton.delta_rule(q, rows, write_key, v, log_decay, initial_state, factor, dtype, min(chunk_size, 64), packing)
    if backend == "torch" and not single:
        return chunked.delta_rule(q, rows, write_key, v, log_decay, initial_state, factor, chunk_size, dtype)
    B, _, H, K = q.shape
    state = q.new_zeros(B, H, K, v.shape[-1], dtype=dtype) if initial_state is None else initial_state.to(dtype)
    with without_autocast(q.device):
        o, state = reference.delta_rule(
            q.to(dtype), _to(rows, dtype), write_key.to(dtype), v.to(dtype), _to(log_decay, dtype), state, factor
        )
    return o.to(v.dtype), state


def diagonal_scan(
    u: Tensor,
    log_decay: Tensor | None = None,
    initial: Tensor | None = None,
    backend: str = "auto",
    chunk_size: int = 64,
    anchor: Tensor | float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The forgetting sum of the diagonal preconditioner  [recurrences.md, section 4.1]:

        A_t = exp(log_decay_t) A_{t-1} + (1 - exp(log_decay_t)) anchor + u_t

    Args:
        u: [B,T,H,K]. log_decay: None or [B,T,H]. initial: A_0 [B,H,K], zeros when None.
        backend, chunk_size: as in `delta_rule`.
        anchor: where forgetting leads, [B,H,K] or a number; None is 0. Without log_decay it has no effect.
        cu_seqlens: packed sequences, as in `delta_rule`: states are [N,H,K] then, and so is an anchor that is a tensor.

    Returns: A [B,T,H,K], every token's own u included, and the last one [B,H,K]; both float32 or wider. Differentiable once.
    Errors: `UserError` (a ValueError) that names the argument.
    """
    check_diagonal_scan(u, log_decay, initial, anchor, chunk_size, cu_seqlens)
    dtype = working_dtype(u, log_decay, initial, anchor if isinstance(anchor, Tensor) else None)
    backend = scan_backend(backend, u, dtype)
    packing = None if cu_seqlens is None else packing_of(cu_seqlens)
    if packing is not None and backend != "triton":
        call = partial(diagonal_scan, backend=backend, chunk_size=chunk_size)
        return in_pieces(call, {"u": u, "log_decay": log_decay}, {"initial": initial}, packing, backend, anchor)
    B, _, H, K = u.shape
    N = B if packing is None else packing.sequences
    goal = anchor_of(anchor, log_decay, (N, H, K), u, dtype)
    first = u.new_zeros(N, H, K, dtype=dtype) if initial is None else initial
    if backend == "cpu":
        return cpu.diagonal_scan(u, log_decay, first, goal, dtype)
    if goal is not None and log_decay is not None:
        u = u + (1 - log_decay.to(dtype).exp())[..., None] * (goal[:, None] if packing is None else packing.per_token(goal))
    if backend == "triton":
        check_working_dtype(dtype)
        return triton.diagonal_scan(u, log_decay, first, packing)
    if backend != "reference":
        return scans.diagonal_scan(u, log_decay, first, chunk_size, dtype)
    return reference.diagonal_scan(u.to(dtype), _to(log_decay, dtype), first.to(dtype))


def hypergradient_scan(
    s: Tensor,
    step: Tensor | float,
    aware: Tensor | None = None,
    log_decay: Tensor | None = None,
    initial: Tensor | None = None,
    box: tuple[float, float] | None = None,
    clip: str = "token",
    backend: str = "auto",
    chunk_size: int = 64,
    anchor: Tensor | float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The hypergradient preconditioner's own recurrence  [OSDN; recurrences.md, section 4.2], b = `aware` or 1 (beta-blind):

        d_{t+1} = clip( gamma_t d_t + (1 - gamma_t) anchor + step_t b_t (1 - b_t <d_t, s_t>) s_t, box ),  gamma = exp(log_decay)

    Args:
        s: squared unit keys k*k, [B,T,H,K].
        step: eta, a number or [B,T,H].
        aware: None, or the step size beta [B,T,H] of a beta-aware preconditioner.
        log_decay: log gamma, None or [B,T,H]. initial: d_1 [B,H,K], zeros when None; it is not clipped.
        box: (lowest, highest), either may be infinite; None for no box.
        clip: "token" clips after every token, exactly, in a loop over tokens; "chunk" clips only what is carried over the end
            of a chunk of `chunk_size` tokens (and of the sequence): faster, another function, to be named so in results;
            "none" ignores the box. At the edge of the box the gradient passes, beyond it it does not, as in torch.clamp.
        backend, chunk_size: as in `delta_rule`; with clip="chunk" the chunk size is part of the function.
        anchor: where forgetting leads, [B,H,K] or a number; None is 0. Without log_decay it has no effect.
        cu_seqlens: packed sequences, as in `delta_rule`: states are [N,H,K] then, and so is an anchor that is a tensor.

    Returns: d [B,T,H,K], each BEFORE its token's update, and d_{T+1} [B,H,K]; both float32 or wider. Differentiable once.
    Errors: `UserError` (a ValueError) that names the argument.
    """
    check_hypergradient_scan(s, step, aware, log_decay, initial, box, clip, anchor, chunk_size, cu_seqlens)
    numbers = [x for x in (step, anchor) if isinstance(x, Tensor)]
    dtype = working_dtype(s, aware, log_decay, initial, *numbers)
    backend = scan_backend(backend, s, dtype)
    packing = None if cu_seqlens is None else packing_of(cu_seqlens)
    B, T, H, K = s.shape
    eta = step if isinstance(step, Tensor) else torch.full((B, T, H), float(step), dtype=dtype, device=s.device)
    if packing is not None and backend != "triton":
        call = partial(hypergradient_scan, box=box, clip=clip, backend=backend, chunk_size=chunk_size)
        tokens = {"s": s, "step": eta, "aware": aware, "log_decay": log_decay}
        return in_pieces(call, tokens, {"initial": initial}, packing, backend, anchor)
    N = B if packing is None else packing.sequences
    goal = anchor_of(anchor, log_decay, (N, H, K), s, dtype)
    first = s.new_zeros(N, H, K, dtype=dtype) if initial is None else initial
    edges, every = clipping(box, clip, chunk_size)
    if backend == "reference":
        b, gamma = _to(aware, dtype), _to(log_decay, dtype)
        return reference.hypergradient_scan(s.to(dtype), eta.to(dtype), b, gamma, first.to(dtype), goal, edges, every)
    if backend == "triton":
        check_working_dtype(dtype)
        return triton.hypergradient_scan(s, eta, aware, log_decay, first, goal, edges, every, packing)
    if backend == "cpu":
        return cpu.hypergradient_scan(s, eta, aware, log_decay, first, goal, edges, every, dtype)
    if edges is not None and clip == "token":
        return token_scan.clipped_hypergradient_scan(s, eta, aware, log_decay, first, goal, edges, dtype)
    return scans.hypergradient_scan(s, eta, aware, log_decay, first, goal, edges, chunk_size, dtype)


def inverse_gram_scan(
    key: Tensor,
    beta: Tensor | None = None,
    log_decay: Tensor | None = None,
    initial: Tensor | None = None,
    before: Tensor | None = None,
    after: Tensor | None = None,
    limit: float = 1e6,
    backend: str = "auto",
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Recursive least squares: reads the inverse P_t = G_t^-1 of a forgetting Gram matrix  [recurrences.md, section 3].

        G_t = alpha_t G_{t-1} + beta_t k_t k_t^T          G_0 = initial^-1, alpha = exp(log_decay)
        u = P_{t-1} k_t        P_t = (P_{t-1} - beta_t u u^T / (alpha_t + beta_t k_t^T u)) / alpha_t

    Forgetting winds P up along every direction that no key visits any more. Hence a token of a head forgets only where that
    leaves the mean diagonal of P at most `limit`, that is where the mean diagonal of P_{t-1} is at most alpha_t limit;
    elsewhere its alpha is 1 (and its log_decay has no gradient). `limit` is a number, not relative to `initial`: so a carried
    state continues as one pass would.

    P has the digits of its dtype beside its largest entry: float32 tells beta k^T P k from 0 up to about 1e6 times what it is
    along other directions. Beyond (long raw keys, P near the limit) P stays finite, as reference.py says, but no longer exact;
    a float64 `initial` makes all of it float64.

    Args:
        key: k, [B,T,H,K]. beta: weight of each key, [B,T,H], at least 0; ones when None. log_decay: None or [B,T,H].
        initial: P_0 [B,H,K,K], positive definite; its symmetric part is used. The caller has to choose it: I / ridge.
        before: rows x [B,T,H,K] to read with P before their token's update, the keys when None.
        after: rows y [B,T,H,K] to read with P after their token's update, or None.
        limit: the largest mean diagonal of P that forgetting may lead to.
        backend: "auto", "reference" (token loop) or "torch" (chunk form, tokens where rounding or `limit` ask for it).
        chunk_size: tokens a chunk at most; matters for speed only.

    Returns: P_{t-1} before_t [B,T,H,K], P_t after_t [B,T,H,K] (None without `after`) and the last P [B,H,K,K]; all float32 or
    wider. Differentiable once in every tensor.
    Errors: `UserError` (a ValueError) that names the argument.
    """
    check_inverse_gram_scan(key, beta, log_decay, initial, before, after, limit, chunk_size)
    assert initial is not None
    backend = resolve_backend(backend, key.device)
    dtype = working_dtype(key, beta, log_decay, initial)
    weight = key.new_ones(key.shape[:3], dtype=dtype) if beta is None else beta
    rows = key if before is None else before
    first = _symmetric(initial.to(dtype))
    if backend != "reference":
        return inverse_gram.inverse_gram_scan(key, weight, log_decay, first, rows, after, float(limit), chunk_size, dtype)
    return reference.inverse_gram_scan(
        key.to(dtype), weight.to(dtype), _to(log_decay, dtype), first, rows.to(dtype), _to(after, dtype), float(limit)
    )


def gram_solve(
    q: Tensor,
    key: Tensor,
    beta: Tensor | None = None,
    log_decay: Tensor | None = None,
    *,
    ridge: Tensor,
    initial: Tensor | None = None,
    iterations: int = 30,
    backend: str = "auto",
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The preconditioner on the query side  [Mesa; recurrences.md, section 3]: x_t = (G_t + Diag(ridge))^-1 q_t with

        G_t = exp(log_decay_t) G_{t-1} + beta_t k_t k_t^T          the token's own key included

    Args:
        q, key: [B,T,H,K]. beta: weight of each key, [B,T,H], at least 0; ones when None. log_decay: None or [B,T,H].
        ridge: [H,K], over 0.
        initial: G_0 [B,H,K,K], positive semidefinite, its symmetric part is used; zeros when None.
        iterations: of the conjugate gradients at most, forward and backward each; they end earlier once every residual is at
            the rounding of the working dtype. K of them solve exactly, fewer where ridge is not small beside G.
        backend: "auto", "reference" (every G_t, a direct solve) or "torch" (conjugate gradients for all tokens at once).
        chunk_size: as in `delta_rule`.

    Returns: x [B,T,H,K] and the last G [B,H,K,K], without the ridge; both float32 or wider. Differentiable once in every tensor.
    Errors: `UserError` (a ValueError) that names the argument.
    """
    check_gram_solve(q, key, beta, log_decay, ridge, initial, iterations, chunk_size)
    backend = resolve_backend(backend, q.device)
    dtype = working_dtype(q, beta, log_decay, ridge, initial)
    B, T, H, K = q.shape
    wide = key.to(dtype)
    first = None if initial is None else _symmetric(initial.to(dtype))
    if backend != "reference":
        write = wide if beta is None else wide * beta.to(dtype)[..., None]
        system = conjugate.System(wide, write, _to(log_decay, dtype), ridge.to(dtype), first)
        return conjugate.gram_solve(q.to(dtype), system, iterations, chunk_size)
    weight = q.new_ones(B, T, H, dtype=dtype) if beta is None else beta.to(dtype)
    first = q.new_zeros(B, H, K, K, dtype=dtype) if first is None else first
    with without_autocast(q.device):
        return reference.gram_solve(q.to(dtype), wide, weight, _to(log_decay, dtype), ridge.to(dtype), first)


def scan_backend(name: str, like: Tensor, dtype: torch.dtype) -> str:
    """A scan carries a vector where `delta_rule` carries a matrix: wide heads leave the loop ahead, as measured at 128."""
    K = like.shape[-1]
    if name == "auto" and like.device.type == "cpu" and K >= _SMALLEST_SCAN:
        return "cpu"
    return resolve_backend(name, like.device, K, K, dtype=dtype)


def check_working_dtype(dtype: torch.dtype) -> None:
    if dtype != torch.float32:
        raise UserError(
            f"backend: 'triton' works in float32, got {str(dtype).removeprefix('torch.')}. Valid: auto, reference, torch"
        )


def _written(write_key: Tensor | None, read_key: Tensor | None, beta: Tensor | None) -> Tensor:
    """The write key, where only beta and the key are given."""
    if write_key is None:
        assert read_key is not None and beta is not None, "check_delta_rule"
        return (beta[..., None] * read_key).to(read_key.dtype)
    return write_key


def in_pieces(
    call: Call,
    tokens: Tensors,
    states: Tensors,
    packing: Packing,
    backend: str,
    anchor: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:
    """Packed sequences on a backend that takes none; an anchor that is a tensor is one per sequence, as states are."""
    if isinstance(anchor, Tensor):
        states = {**states, "anchor": anchor}
    elif anchor is not None:
        call = partial(call, anchor=anchor)
    return (one_by_one if backend == "reference" else in_batches)(call, tokens, states, packing)


def clipping(box: tuple[float, float] | None, clip: str, chunk_size: int) -> tuple[tuple[float, float] | None, int]:
    """(the box where anything is clipped to it, after how many tokens it is)."""
    edges = None if box is None or clip == "none" else (float(box[0]), float(box[1]))
    return edges, chunk_size if clip == "chunk" else 1


def anchor_of(
    anchor: Tensor | float | None, log_decay: Tensor | None, shape: Sequence[int], like: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """The anchor [B,H,K] in the working dtype, where anything is forgotten."""
    if log_decay is None or anchor is None:
        return None
    return anchor.to(dtype) if isinstance(anchor, Tensor) else like.new_full(shape, float(anchor), dtype=dtype)


def _symmetric(x: Tensor) -> Tensor:
    return (x + x.mT) / 2


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)
