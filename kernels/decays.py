"""The three gates of the chunk form, behind one interface: no decay, one number per head, one per key channel.

Within a chunk let g_i be the inclusive prefix sum of log_decay. The chunk form [recurrences.md, section 5] needs

    pairs       P_ij = sum_k x_ik w_jk exp(g_ik - g_jk)   for j <= i  (j < i for the erase rows)
    from_start  x_i exp(g_i)               a row's view of the state that entered the chunk
    to_end      w_j exp(g_C - g_j)         what a column still weighs when the chunk ends
    carry       S exp(g_C)

and the adjoints of each. Queries and read keys enter only as x exp(g) and write keys only as w exp(-g), so the gradient of g
needs no derivative of any exponential: per channel dg = x dx - w dw, summed over the rows' kinds (over K too, for one number
per head).

No exponent is ever positive unless the caller's own log_decay is: nothing is divided by a decay, so a gate may be as strong as
it likes. Shapes: rows X [R,N,G,C,K] (R = 2: read keys, queries; R = 1: queries alone), columns W [N,G,C,K], pairs [R,N,G,C,C],
log_decay [N,G,C] or [N,G,C,K], state [G,K,V]; G = batch x heads.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .precision import clamp_log_decay, decay_exp_, suffix_sum
from .triangular import causal


class Decay(Protocol):
    """What a chunk needs to know about its gate."""

    def pairs(self, X: Tensor, W: Tensor) -> Tensor:
        """Decayed, causally masked products of rows and columns, [R,N,G,C,C]."""

    def pairs_backward(self, dP: Tensor, X: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of `pairs` for X and W. Overwrites dP."""

    def from_start(self, X: Tensor) -> Tensor:
        """Rows decayed from the start of their chunk."""

    def to_end(self, W: Tensor) -> Tensor:
        """Columns decayed to the end of their chunk."""

    def carry(self, S: Tensor, n: int) -> Tensor:
        """The state after the decays of the whole chunk n."""

    def gradient(self, X: Tensor, dX: Tensor, W: Tensor, dW: Tensor, at_end: Tensor | None) -> Tensor | None:
        """d log_decay from rows, columns and their gradients, and sum_V dS_end S_end [N,G,K] of the state that leaves."""


def decay_of(log_decay: Tensor | None, dtype: torch.dtype, size: int, device: torch.device) -> Decay:
    """The gate of `log_decay`: None, [N,G,C] or [N,G,C,K], in chunks of `size` tokens."""
    if log_decay is None:
        return NoDecay(size, dtype, device)
    return ScalarDecay(log_decay) if log_decay.ndim == 3 else ChannelDecay(log_decay)


def products(X: Tensor, W: Tensor, out: Tensor | None = None) -> Tensor:
    """x_i . w_j for every kind of row, [R,N,G,C,C]."""
    P = X.new_empty(*X.shape[:-1], W.shape[-2]) if out is None else out
    columns = W.flatten(0, 1).mT
    for kind, rows in enumerate(X):
        torch.bmm(rows.flatten(0, 1), columns, out=P[kind].flatten(0, 1))
    return P


def products_backward(dP: Tensor, X: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    dX, dW = torch.empty_like(X), torch.empty_like(W)
    columns, d_columns = W.flatten(0, 1), dW.flatten(0, 1)
    for kind, rows in enumerate(X):
        d_pairs = dP[kind].flatten(0, 1)
        torch.bmm(d_pairs, columns, out=dX[kind].flatten(0, 1))
        torch.baddbmm(d_columns, d_pairs.mT, rows.flatten(0, 1), beta=min(kind, 1), out=d_columns)
    return dX, dW


class NoDecay:
    """Nothing is forgotten: a mask is all there is."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._masks = causal(size, 2, dtype, device)

    def pairs(self, X: Tensor, W: Tensor) -> Tensor:
        return products(X, W).mul_(self._masks[-X.shape[0] :])

    def pairs_backward(self, dP: Tensor, X: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
        return products_backward(dP.mul_(self._masks[-X.shape[0] :]), X, W)

    def from_start(self, X: Tensor) -> Tensor:
        return X

    def to_end(self, W: Tensor) -> Tensor:
        return W

    def carry(self, S: Tensor, n: int) -> Tensor:
        return S

    def gradient(self, X: Tensor, dX: Tensor, W: Tensor, dW: Tensor, at_end: Tensor | None) -> Tensor | None:
        return None


class ScalarDecay:
    """One decay per head and token: a C x C matrix of decays beside the products."""

    def __init__(self, log_decay: Tensor) -> None:
        g = clamp_log_decay(log_decay).cumsum(-1)
        lower = causal(g.shape[-1], 1, g.dtype, g.device)[0]
        # The differences above the diagonal are positive and could overflow: they become exp(0) and then 0.
        self._weights = decay_exp_((g[..., :, None] - g[..., None, :]).mul_(lower)).mul_(lower)
        self._from_start = decay_exp_(g.clone())[..., None]
        self._to_end = decay_exp_(g[..., -1:] - g)[..., None]

    def _weigh(self, P: Tensor) -> Tensor:
        P.mul_(self._weights)
        if P.shape[0] == 2:
            P[0].diagonal(dim1=-2, dim2=-1).zero_()
        return P

    def pairs(self, X: Tensor, W: Tensor) -> Tensor:
        return self._weigh(products(X, W))

    def pairs_backward(self, dP: Tensor, X: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
        return products_backward(self._weigh(dP), X, W)

    def from_start(self, X: Tensor) -> Tensor:
        return X * self._from_start

    def to_end(self, W: Tensor) -> Tensor:
        return W * self._to_end

    def carry(self, S: Tensor, n: int) -> Tensor:
        return S * self._from_start[n, :, -1:]

    def gradient(self, X: Tensor, dX: Tensor, W: Tensor, dW: Tensor, at_end: Tensor | None) -> Tensor | None:
        dg = (X * dX).sum(-1).sum(0).sub_((W * dW).sum(-1))
        if at_end is not None:
            dg[..., -1] += at_end.sum(-1)
        return suffix_sum(dg, -1)


class ChannelDecay:
    """One decay per key channel. exp(g_i - g_j) no longer factors out of the product over channels, and exp(-g_j) may overflow.

    So the lower triangle is cut into squares: for s = 1, 2, 4, ..., C/2 the rows of the second half of every block of 2s tokens
    meet the columns of its first half, both measured from the boundary between them:
    exp(g_i - g_j) = exp(g_i - g_boundary) exp(g_boundary - g_j). One batched product per level, all exact; C is a power of two.

    The decays themselves grow with the blocks: from the start of a block to a row, and from a column to the end of its block,
    are each one multiplication away from the same in blocks of half the size. One exponential per token and channel is all.
    """

    def __init__(self, log_decay: Tensor) -> None:
        to_row, size = decay_exp_(log_decay.clone()), log_decay.shape[-2]
        to_end = torch.ones_like(to_row)
        assert size & (size - 1) == 0, "the tree of squares needs a power of two"
        self._levels: list[tuple[int, Tensor, Tensor]] = []
        for span in (1 << level for level in range(size.bit_length() - 1)):
            rows, columns = _halves(to_row, span), _halves(to_end, span)
            after, before = rows[:, :, 1].clone(), columns[:, :, 0].clone()
            self._levels.append((span, after, before))
            columns[:, :, 0].mul_(after[:, :, -1:])
            rows[:, :, 1].mul_(rows[:, :, 0, -1:])
        self._from_start, self._to_end = to_row, to_end

    def pairs(self, X: Tensor, W: Tensor) -> Tensor:
        P = X.new_zeros(*X.shape[:-1], X.shape[-2])
        torch.sum(X[-1] * W, -1, out=P[-1].diagonal(dim1=-2, dim2=-1))
        for span, after, before in self._levels:
            columns = (_halves(W, span)[:, :, 0] * before).flatten(0, 1).mT
            for kind, rows in enumerate(X):
                square = torch.bmm((_halves(rows, span)[:, :, 1] * after).flatten(0, 1), columns)
                _squares(P[kind], span).copy_(square.view(*after.shape[:2], span, span))
        return P

    def pairs_backward(self, dP: Tensor, X: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
        diagonal = dP[-1].diagonal(dim1=-2, dim2=-1)[..., None]
        dX, dW = torch.zeros_like(X), X[-1] * diagonal
        torch.mul(W, diagonal, out=dX[-1])
        for span, after, before in self._levels:
            columns = (_halves(W, span)[:, :, 0] * before).flatten(0, 1)
            for kind, rows in enumerate(X):
                square = _squares(dP[kind], span).reshape(-1, span, span)
                d_columns = _product(square.mT, (_halves(rows, span)[:, :, 1] * after).flatten(0, 1))
                _halves(dX[kind], span)[:, :, 1].addcmul_(_product(square, columns).view_as(after), after)
                _halves(dW, span)[:, :, 0].addcmul_(d_columns.view_as(before), before)
        return dX, dW

    def from_start(self, X: Tensor) -> Tensor:
        return X * self._from_start

    def to_end(self, W: Tensor) -> Tensor:
        return W * self._to_end

    def carry(self, S: Tensor, n: int) -> Tensor:
        return S * self._from_start[n, :, -1, :, None]

    def gradient(self, X: Tensor, dX: Tensor, W: Tensor, dW: Tensor, at_end: Tensor | None) -> Tensor | None:
        dg = (X * dX).sum(0).addcmul_(W, dW, value=-1)
        if at_end is not None:
            dg[..., -1, :] += at_end
        return suffix_sum(dg, -2)


def _product(squares: Tensor, rows: Tensor) -> Tensor:
    """squares @ rows, [M,s,s] and [M,s,K]. The smallest are sums of outer products: batches of them cost 5 times as much."""
    if squares.shape[-1] > 2:
        return torch.bmm(squares, rows)
    total = squares[..., :1] * rows[:, :1]
    for j in range(1, squares.shape[-1]):
        total.addcmul_(squares[..., j : j + 1], rows[:, j : j + 1])
    return total


def _halves(x: Tensor, span: int) -> Tensor:
    """[N,G,C,K] -> [N*G, blocks, 2, span, K], a view."""
    return x.view(x.shape[0] * x.shape[1], -1, 2, span, x.shape[-1])


def _squares(P: Tensor, span: int) -> Tensor:
    """The squares of one level of [N,G,C,C]: second halves against first halves, [N*G, blocks, span, span], a view."""
    blocks = P.shape[-1] // (2 * span)
    tiles = P.view(P.shape[0] * P.shape[1], blocks, 2, span, blocks, 2, span)[:, :, 1, :, :, 0]
    return tiles.diagonal(dim1=1, dim2=3).movedim(-1, 1)
