"""The chunk form on a GPU: which kernels run, in which order, and what is kept for the backward pass.

[recurrences.md, section 5; the torch form is ../chunked.py]. With G the prefix sums of log_decay within a chunk:

    M, A    products of read keys and of queries with write keys, decayed, lower triangular            pairs.py
    T       (I + M)^-1                                                                                 inverse.py
    U, Y    T V and T (R exp(G))                                                                       transform.py
    E, S    U - Y S, and the states between chunks                                                     states.py
    O       scale (Q exp(G)) S + A E                                                                   outputs.py

Kept for the backward pass: the inputs but v, E in v's place, and the states between chunks. M, A, T are computed again.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .input_gradients import Adjoint, input_gradients
from .launch import Shape, gate_of
from .outputs import outputs
from .pair_gradients import pair_gradients
from .pairs import pairs, unit_inverse
from .prefix import prefix_sum, prefix_sum_adjoint
from .state_gradients import state_gradients
from .states import states
from .transform import decayed, transform


class Forward(NamedTuple):
    o: Tensor  # [B,T,H,V]
    last: Tensor  # [B,H,K,V] fp32
    E: Tensor  # [B,T,H,V]
    S: Tensor  # [chunks+N,H,K,V], N sequences


class Keys(NamedTuple):
    """The rows and columns of the pass over chunks. A channel gate is in them, a scalar one is applied later."""

    from_start: Tensor | None  # read keys R exp(G)
    to_end: Tensor  # write keys W exp(G_C - G)


def decayed_keys(r: Tensor | None, w: Tensor, G: Tensor | None, shape: Shape) -> Keys:
    if G is None or gate_of(G) == "scalar":
        return Keys(r, w)
    return Keys(None if r is None else decayed(r, G, shape), decayed(w, G, shape, to_end=True))


def forward(
    q: Tensor, r: Tensor | None, w: Tensor, v: Tensor, g: Tensor | None, first: Tensor | None, scale: float, shape: Shape
) -> Forward:
    G = prefix_sum(g, shape)
    per_head = G if gate_of(G) == "scalar" else None
    M, A = pairs(q, r, w, G, scale, shape)
    keys = decayed_keys(r, w, G, shape)
    U, Y = v, None
    if M is not None and keys.from_start is not None:
        inverse = unit_inverse(M, shape)
        U, Y = transform(inverse, v, shape), transform(inverse, keys.from_start, shape, G=per_head)
    E, S, last = states(U, Y, keys.to_end, G, first, shape)
    return Forward(outputs(q, G, S, A, E, scale, v.dtype, shape), last, E, S)


class Gradients(NamedTuple):
    q: Tensor
    r: Tensor | None
    w: Tensor
    v: Tensor
    g: Tensor | None
    first: Tensor  # [B,H,K,V] fp32


def backward(
    q: Tensor,
    r: Tensor | None,
    w: Tensor,
    g: Tensor | None,
    first: Tensor | None,
    E: Tensor,
    S: Tensor,
    dO: Tensor,
    d_last: Tensor | None,
    scale: float,
    shape: Shape,
    decay_gradient: bool,
) -> Gradients:
    """The adjoint of `forward`: the same matrices again, transposed, and the pass over chunks backwards. No atomics.

    dO A^T and the columns W exp(G_C - G) go through (I + M)^-T before the pass, as U and Y did   transform.py
    dV, dS      gradients of the values and of the states between chunks                          state_gradients.py
    dA, dM      gradients of the pairs                                                            pair_gradients.py
    dq, dr, dw  and dG                                                                            input_gradients.py
    d log_decay from dG                                                                           prefix.py
    """
    G = prefix_sum(g, shape)
    channel = gate_of(G) == "channel"
    per_head = G if gate_of(G) == "scalar" else None
    M, A = pairs(q, r, w, G, scale, shape)
    keys = decayed_keys(r, w, G, shape)
    dV_local = transform(A, dO, shape, transposed=True)
    Z = keys.to_end
    if M is not None:
        inverse = unit_inverse(M, shape)
        dV_local = transform(inverse, dV_local, shape, transposed=True)
        Z = transform(inverse, Z, shape, transposed=True, G=per_head, to_end=True)
    rows = decayed(q, G, shape, scale=scale) if channel and G is not None else q
    dV, dS, d_first = state_gradients(rows, keys.from_start, Z, G, dO, dV_local, d_last, scale, shape)
    dA, dM = pair_gradients(dO, dV, E, G, r is not None, scale, shape)
    dq, dr, dw, dG = input_gradients(q, r, w, G, E, S, Adjoint(dO, dV, dS, dA, dM), scale, shape)
    dg = None if g is None or dG is None or not decay_gradient else prefix_sum_adjoint(dG, g, first is not None, shape)
    return Gradients(dq, dr, dw, dV, dg, d_first)
