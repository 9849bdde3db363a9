"""A block of recursive least squares, by products or token by token, forward and backward. The definition: reference.py.

**Products.** With P entering the block, g the inclusive prefix sum of log alpha in it and B the rows sqrt(beta_j exp(-g_j)) k_j:

    I + B P B^T = L L^T        W = L^-1 B P
    P_t y = exp(-g_t) (P y - sum_{j<=t} w_j <w_j, y>)        P' = exp(-g_C) (P - W^T W)

Backward, the factors exp(-g) aside, with Z = L^-1 B (= W G), Lam the adjoint of P', rows y = P_t x and v = P_t dy:

    H_j = -1/2 sum_{t that see j} (v_t <y_t, k_j> + y_t <v_t, k_j>) - P' Lam P' k_j        dk = 2 beta H, dbeta = <k, H>
    dP  = (I - W^T Z)^T Lam (I - W^T Z) + sum_t sym( (G v_t) (G y_t)^T )        G y_t = x_t - sum_{j<=t} z_j <w_j, x_t>

so no G = P^-1 is formed, and no square root differentiated: beta may be 0. The squared pivots of L are the token loop's
1 + beta k^T P k / alpha, at least 1 in exact arithmetic. Where rounding makes them less, P's digits do not suffice for keys of
that length: such a block is halved, and so is one whose gates would cost the products too many digits.

**Tokens.** The loop, for what is too short for products; h = P_{t-1} k / (alpha + beta k^T P_{t-1} k) = P_t k, Lam that of P_t:

    dk = -2 beta P_t Lam h        dbeta = -h^T Lam h        d log alpha = beta h^T Lam h - <Lam, P_t>
    dP_{t-1} = (I - beta h k^T)^T Lam (I - beta h k^T) / alpha

Shapes: keys [G,C,K], rows [R,G,C,K] (R = 1: P before each token's update reads; R = 2: and P after it), P [G,K,K].
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .precision import suffix_sum
from .triangular import causal

# The products lose the digits by which a block's gates shrink what entered it: two of float32's seven.
_MOST_FORGOTTEN = 4.6
_LOWEST_PIVOT = 0.9
_SHORTEST = 8
# Which tokens may forget depends on P and P on them: the guess is mended until it agrees with itself, mostly at once.
_GUESSES = 4


class Block(NamedTuple):
    """The tokens of one block."""

    key: Tensor  # [G,C,K]
    beta: Tensor  # [G,C]
    log_decay: Tensor | None  # [G,C]
    X: Tensor  # [R,G,C,K] the rows that P reads

    def cut(self, tokens: slice) -> Block:
        log_decay = None if self.log_decay is None else self.log_decay[:, tokens]
        return Block(self.key[:, tokens], self.beta[:, tokens], log_decay, self.X[:, :, tokens])


class Gradients(NamedTuple):
    """Of a block's tokens, and of the P that entered it."""

    key: Tensor
    beta: Tensor
    log_decay: Tensor | None
    X: Tensor
    P: Tensor


class Form(Protocol):
    """A way to compute a block."""

    def forward(self) -> tuple[Tensor, Tensor]:
        """What P reads [R,G,C,K], and the P that leaves."""

    def backward(self, dY: Tensor, Lam: Tensor) -> Gradients:
        """From the gradient of what was read and the adjoint of the P that leaves."""


def form_of(block: Block, P: Tensor, limit: float) -> Form:
    """The fastest form that is exact for this block. The choice has no gradient, and backward makes it again."""
    size = block.key.shape[1]
    products = Products.of(block, P, limit) if size >= _SHORTEST else None
    if products is not None:
        return products
    return Halves.of(block, P, limit) if size >= 2 * _SHORTEST else Tokens.of(block, P, limit)


def symmetric(P: Tensor) -> Tensor:
    return (P + P.mT).mul_(0.5)


class Products(NamedTuple):
    block: Block
    P: Tensor  # [G,K,K]
    B: Tensor  # [G,C,K]
    L: Tensor  # [G,C,C]
    W: Tensor  # [G,C,K]
    g: Tensor | None  # [G,C]
    forgets: Tensor | None  # [G,C], 1 for the tokens that may, else 0

    @classmethod
    def of(cls, x: Block, P: Tensor, limit: float) -> Products | None:
        """None where the block is too long for them."""
        if x.log_decay is None:
            factors = _factors(x.key, x.beta, P)
            return None if factors is None else cls(x, P, *factors, None, None)
        trace = _trace(P)[:, None]
        highest = x.log_decay.exp() * (limit * P.shape[-1])
        if not bool((_size(P) <= 2 * trace).all()):
            return None
        forgets = trace <= highest
        for _ in range(_GUESSES):
            g = torch.where(forgets, x.log_decay, 0.0).cumsum(-1)
            if not bool((g.abs() <= _MOST_FORGOTTEN).all()):
                return None
            factors = _factors(x.key, x.beta * (-g).exp(), P)
            if factors is None:
                return None
            gone = factors[-1].square().sum(-1)
            allowed = (trace - (gone.cumsum(-1) - gone)) * (-_before(g)).exp() <= highest
            if torch.equal(allowed, forgets):
                return cls(x, P, *factors, g, forgets.to(g.dtype))
            forgets = allowed
        return None

    def forward(self) -> tuple[Tensor, Tensor]:
        Y, P = self._read(self.block.X), self._leaving()
        if self.g is not None:
            Y.mul_(self._growth(self.g))
            P.mul_((-self.g[:, -1, None, None]).exp())
        return Y, P

    def backward(self, dY: Tensor, Lam: Tensor) -> Gradients:
        key, beta, _, X = self.block
        weight, leaving, Y = beta, self._leaving(), self._read(X)
        if self.g is not None:
            weight, dY, Lam = beta * (-self.g).exp(), dY * self._growth(self.g), Lam * (-self.g[:, -1, None, None]).exp()
        V = self._read(dY)
        H = (key @ leaving) @ Lam @ leaving
        for y, v, mask in zip(Y, V, self._masks(), strict=True):
            H.baddbmm_((y @ key.mT).mul_(mask).mT, v, alpha=0.5).baddbmm_((v @ key.mT).mul_(mask).mT, y, alpha=0.5)
        H.neg_()
        d_weight = (key * H).sum(-1)
        d_beta, d_log = d_weight, None
        if self.g is not None and self.forgets is not None:
            d_beta = d_weight * (-self.g).exp()
            dg = -weight * d_weight
            dg[:, -1] -= (leaving * Lam).sum((-2, -1))
            read = (Y * dY).sum(-1)
            dg[:, :-1] -= read[0, :, 1:]  # read before the token's own decay
            if len(read) == 2:
                dg -= read[1]
            d_log = suffix_sum(dg, -1).mul_(self.forgets)
        return Gradients(H.mul_(2 * weight[..., None]), d_beta, d_log, V, self._entering(dY, Lam))

    def _entering(self, dY: Tensor, Lam: Tensor) -> Tensor:
        """The adjoint of P from that of the P that leaves and of what was read, both without their decays."""
        Z: Tensor = torch.linalg.solve_triangular(self.L, self.B, upper=False)
        held = self.W @ Lam
        change = Z.mT @ held.baddbmm_(held @ self.W.mT, Z, alpha=-0.5)
        for dy, x, mask in zip(dY, self.block.X, self._masks(), strict=True):
            dy, x = (torch.baddbmm(row, (row @ self.W.mT).mul_(mask), Z, alpha=-1) for row in (dy, x))
            change.baddbmm_(dy.mT, x, alpha=-0.5)
        return Lam - (change + change.mT)

    def _read(self, X: Tensor) -> Tensor:
        """P_t x for every row, without the decays."""
        Y = X @ self.P
        for y, x, mask in zip(Y, X, self._masks(), strict=True):
            y.baddbmm_((x @ self.W.mT).mul_(mask), self.W, alpha=-1)
        return Y

    def _leaving(self) -> Tensor:
        return symmetric(torch.baddbmm(self.P, self.W.mT, self.W, alpha=-1))

    def _masks(self) -> list[Tensor]:
        """[C,C] for every kind of row: before its token's update, and after it."""
        masks = causal(self.W.shape[1], 2, self.W.dtype, self.W.device)[:, 0, 0]
        return list(masks[: len(self.block.X)])

    def _growth(self, g: Tensor) -> Tensor:
        """What the decays have made of P when a row is read, [R,G,C,1]."""
        return torch.stack([_before(g), g][: len(self.block.X)]).neg_().exp_()[..., None]


class Halves(NamedTuple):
    first: Form
    second: Form
    Y: Tensor  # [R,G,C/2,K] what the first half reads

    @classmethod
    def of(cls, x: Block, P: Tensor, limit: float) -> Halves:
        half = x.key.shape[1] // 2
        first = form_of(x.cut(slice(None, half)), P, limit)
        Y, between = first.forward()
        return cls(first, form_of(x.cut(slice(half, None)), between, limit), Y)

    def forward(self) -> tuple[Tensor, Tensor]:
        Y, P = self.second.forward()
        return torch.cat([self.Y, Y], dim=2), P

    def backward(self, dY: Tensor, Lam: Tensor) -> Gradients:
        half = self.Y.shape[2]
        later = self.second.backward(dY[:, :, half:], Lam)
        sooner = self.first.backward(dY[:, :, :half], later.P)
        d_log = None
        if sooner.log_decay is not None and later.log_decay is not None:
            d_log = torch.cat([sooner.log_decay, later.log_decay], dim=1)
        return Gradients(
            torch.cat([sooner.key, later.key], dim=1),
            torch.cat([sooner.beta, later.beta], dim=1),
            d_log,
            torch.cat([sooner.X, later.X], dim=2),
            sooner.P,
        )


class Tokens(NamedTuple):
    """Time leads here: [C,G,.]."""

    block: Block
    states: Tensor  # [C+1,G,K,K] every P
    h: Tensor  # [C,G,K] P_t k
    beta: Tensor  # [C,G,1] 0 where rounding has made P indefinite
    growth: Tensor | None  # [C,G,1] 1 / alpha of the tokens that may forget, else 1
    forgets: Tensor | None  # [C,G,1], 1 for the tokens that may, else 0

    @classmethod
    def of(cls, x: Block, P: Tensor, limit: float) -> Tokens:
        C, K = x.key.shape[1:]
        states = P.new_empty(C + 1, *P.shape)
        states[0] = P
        key, beta = _time_first(x.key), _time_first(x.beta[..., None])
        h = torch.empty_like(key)
        alpha, growth, forgets = torch.ones_like(beta), torch.ones_like(beta), torch.zeros_like(beta)
        gate = None if x.log_decay is None else _time_first(x.log_decay[..., None]).exp()
        highest = alpha if gate is None else gate * (limit * K)
        for t in range(C):
            P, k, after = states[t], key[t], states[t + 1]
            u = (P * k[:, None, :]).sum(-1)
            g = (k * u).sum(-1, keepdim=True)
            trace = _trace(P)[:, None]
            b = beta[t].mul_((g >= 0) & ((u * u).sum(-1, keepdim=True) <= 2 * trace * g))
            if gate is not None:
                may = (trace <= highest[t]) & (_size(P) <= 2 * trace)
                torch.where(may, gate[t], alpha[t], out=alpha[t])
                torch.reciprocal(alpha[t], out=growth[t])
                forgets[t] = may
                P = torch.mul(P, growth[t, ..., None], out=after)
            inverse = torch.addcmul(alpha[t], b, g).reciprocal_()
            torch.mul(u, inverse, out=h[t])
            # One vector from both sides: rounded so, P stays symmetric to the last bit, as it must (reference.py).
            v = u.mul_((b * inverse).mul_(growth[t]).sqrt_())
            torch.addcmul(P, v[:, :, None], v[:, None, :], value=-1, out=after)
        return cls(x, states, h, beta, *((None, None) if gate is None else (growth, forgets)))

    def forward(self) -> tuple[Tensor, Tensor]:
        return self._read(self.block.X), self.states[-1]

    def backward(self, dY: Tensor, Lam: Tensor) -> Gradients:
        key, Lams = _time_first(self.block.key), self._sources(dY)
        Lams[-1] += Lam
        held, pull = torch.empty_like(key), torch.empty_like(self.beta)
        for t in reversed(range(len(key))):
            Lam, b, k = Lams[t + 1], self.beta[t], key[t]
            torch.sum(Lam * self.h[t, :, None, :], -1, out=held[t])
            torch.sum(self.h[t] * held[t], -1, keepdim=True, out=pull[t])
            # Lam - beta (k m^T + m k^T) is the product from both sides, m = Lam h - beta/2 (h^T Lam h) k.
            m = torch.addcmul(held[t], b * pull[t], k, value=-0.5).mul_(b)
            both = (m[:, :, None] * k[:, None, :]).add_(k[:, :, None] * m[:, None, :])
            change = torch.sub(Lam, both, out=both)
            if self.growth is not None:
                change.mul_(self.growth[t, ..., None])
            Lams[t] += change
        d_key = _apply(self.states[1:], held).mul_(-2 * self.beta)
        d_beta = -pull.masked_fill(_time_first(self.block.beta[..., None]) != self.beta, 0)
        d_log = None
        if self.forgets is not None:
            weighed = (Lams[1:] * self.states[1:]).sum((-2, -1))[..., None]
            d_log = (self.beta * pull - weighed).mul_(self.forgets)[..., 0].T
        return Gradients(d_key.transpose(0, 1), d_beta[..., 0].T, d_log, self._read(dY), Lams[0])

    def _sources(self, dY: Tensor) -> Tensor:
        """What the reads add to the adjoint of every P, [C+1,G,K,K]."""
        x, dy = _time_first(self.block.X), _time_first(dY)
        sources = torch.zeros_like(self.states)
        for kind in range(x.shape[1]):
            sources[kind : len(x) + kind] += dy[:, kind, :, :, None] * (0.5 * x[:, kind, :, None, :])
        return sources + sources.mT

    def _read(self, X: Tensor) -> Tensor:
        rows = [_apply(self.states[kind : len(self.states) - 1 + kind], _time_first(x)) for kind, x in enumerate(X)]
        return torch.stack(rows).transpose(1, 2)


def _factors(key: Tensor, weight: Tensor, P: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """B, L and W; None where the pivots or the trace of W^T W show that rounding has taken over."""
    B = weight.sqrt()[..., None] * key
    BP = B @ P
    A = BP @ B.mT
    A.diagonal(dim1=-2, dim2=-1).add_(1)
    L, failed = torch.linalg.cholesky_ex(A)
    W: Tensor = torch.linalg.solve_triangular(L, BP, upper=False)
    sound = (L.diagonal(dim1=-2, dim2=-1).square() >= _LOWEST_PIVOT).all(-1) & (failed == 0)
    sound &= W.square().sum((-2, -1)) <= 2 * _trace(P)
    return (B, L, W) if bool(sound.all()) else None


def _before(g: Tensor) -> Tensor:
    """The prefix sums that leave out a token's own decay, [G,C]."""
    return torch.cat([torch.zeros_like(g[:, :1]), g[:, :-1]], dim=1)


def _trace(P: Tensor) -> Tensor:
    return P.diagonal(dim1=-2, dim2=-1).sum(-1)


def _size(P: Tensor) -> Tensor:
    """The Frobenius norm, [G,1]."""
    return P.square().sum((-2, -1)).sqrt()[:, None]


def _time_first(x: Tensor) -> Tensor:
    """[G,C,.] -> [C,G,.]; [R,G,C,.] -> [C,R,G,.]."""
    return x.movedim(-2, 0).contiguous()


def _apply(P: Tensor, x: Tensor) -> Tensor:
    """P x for every token and head."""
    return torch.matmul(P, x[..., None])[..., 0]
