"""The recurrence token by token in one launch: decoding, and short prompts without gradients.

    S~ = Diag(a_t) S_{t-1};  e_t = v_t - S~^T r_t;  S_t = S~ + w_t e_t^T;  o_t = scale S_t^T q_t

One program holds S[K, BV] of one (batch, head) in registers, in float32, and walks over all tokens: the state is read and written
once per launch. Columns of S never meet, so the V blocks are independent.

    q, r, w [B,T,H,K]; v, o [B,T,H,V]; g (log a) [B,T,H] or [B,T,H,K]; first, last [N,H,K,V] fp32, N sequences
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, tiles
from .launch import Shape, ceil_div, gate_of, padded


@triton.jit(do_not_specialize=["T", "sequences"])
def recurrent_kernel(
    q, r, w, v, g, first, o, last, scale, table, sequences, T,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    GATE: tl.constexpr, ERASE: tl.constexpr, FIRST: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    s, h = group // H, group % H
    v0 = tl.program_id(1) * BV
    begin, length, _ = tiles.sequence(s, table, sequences, T, 1, PACKED)
    ks = tl.arange(0, BK)
    vs = v0 + tl.arange(0, BV)
    token = begin * H + h
    S = tiles.state_tile(first, group, 0, v0, K, V, BK, BV).to(tl.float32) if FIRST else tl.zeros([BK, BV], tl.float32)
    for _ in range(length):
        at_k, at_v = token * K + ks, token * V + vs
        if GATE == "scalar":
            S *= tl.exp(tl.load(g + token).to(tl.float32))
        elif GATE == "channel":
            S *= tl.exp(tl.load(g + at_k, mask=ks < K, other=0.0).to(tl.float32))[:, None]
        e = tl.load(v + at_v, mask=vs < V, other=0.0).to(tl.float32)
        if ERASE:
            e -= tl.sum(S * tl.load(r + at_k, mask=ks < K, other=0.0).to(tl.float32)[:, None], 0)
        S += tl.load(w + at_k, mask=ks < K, other=0.0).to(tl.float32)[:, None] * e[None, :]
        read = tl.sum(S * tl.load(q + at_k, mask=ks < K, other=0.0).to(tl.float32)[:, None], 0)
        tl.store(o + at_v, (read * scale).to(o.dtype.element_ty), mask=vs < V)
        token += H
    tiles.store_state(last, S, group, 0, v0, K, V, BK, BV)


def recurrent(
    q: Tensor, r: Tensor | None, w: Tensor, v: Tensor, g: Tensor | None, first: Tensor | None, scale: float, shape: Shape
) -> tuple[Tensor, Tensor]:
    """o [B,T,H,V] in v's dtype and the last state [B,H,K,V] in float32."""
    o = torch.empty_like(v)
    last = torch.empty(shape.sequences, shape.H, shape.K, shape.V, dtype=torch.float32, device=q.device)
    BK = padded(shape.K)
    # 64 floats of state a thread at most; one warp reduces over K without leaving its registers.
    BV = min(padded(shape.V), 16)
    warps = max(1, BK * BV // 2048)
    arguments = {
        "q": q, "r": q if r is None else r, "w": w, "v": v, "g": q if g is None else g, "first": last if first is None else first,
        "o": o, "last": last, "scale": scale, **launch.places(q, shape.T, shape.H, launch.WHOLE, shape.packing), "K": shape.K,
        "V": shape.V, "BK": BK, "BV": BV, "GATE": gate_of(g), "ERASE": r is not None, "FIRST": first is not None,
    }  # fmt: skip
    launch.run(recurrent_kernel, (shape.heads, ceil_div(shape.V, BV)), arguments, warps, registers=255)
    return o, last
