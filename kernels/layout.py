"""From [B,T,H,...] to chunks [N,G,C,...] and back: N chunks of C tokens, G = batch x heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

# On a CPU: the longest chunk, and the elements of one span's C x C matrices. Measured on one thread over chunks of 16, 32 and 64
# and spans of 2^14 to 2^20 elements: shorter chunks do less arithmetic, longer ones call less; spans that outgrow the
# second-level cache cost up to twice the time, much of it in fresh pages.
_CPU_CHUNK = 32
_CPU_SPAN = 1 << 17


@dataclass(frozen=True)
class Plan:
    """How a sequence is cut: `count` chunks of `size` tokens, worked off `span` chunks at a time."""

    batch: int
    length: int
    heads: int
    size: int
    count: int
    span: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor, chunk_size: int, dtype: torch.dtype, power_of_two: bool = False, exact: bool = False) -> Plan:
        """Chunks of at most `chunk_size` tokens, of even length so that the last one is not mostly padding.

        `exact`: chunks end at the multiples of `chunk_size`, because something happens there."""
        batch, length, heads = x.shape[:3]
        on_cpu = x.device.type == "cpu"
        if on_cpu and not exact:
            chunk_size = min(chunk_size, _CPU_CHUNK)
        count = -(-length // chunk_size)
        size = min(chunk_size, length) if exact else -(-length // max(count, 1))
        size = max(size, 1)
        if power_of_two:
            size = 1 << (size - 1).bit_length()
            size = size if size <= chunk_size else size // 2
            count = -(-length // size)
        # A GPU is best filled by everything at once; a CPU by what stays in its cache.
        span = _CPU_SPAN // (batch * heads * size * size) if on_cpu else count
        return cls(batch, length, heads, size, count, max(span, 1), dtype, x.device)

    def spans(self) -> Iterator[tuple[int, int]]:
        """First chunk and the one after the last, of every span."""
        for start in range(0, self.count, self.span):
            yield start, min(start + self.span, self.count)

    def shape(self, start: int | None = None) -> tuple[int, int, int]:
        """(N, G, C) of the span that begins at chunk `start`, or of the whole sequence."""
        chunks = self.count if start is None else min(self.span, self.count - start)
        return chunks, self.batch * self.heads, self.size


def gather(plan: Plan, start: int, x: Tensor, out: Tensor | None = None) -> Tensor:
    """The span of [B,T,H,...] that begins at chunk `start`, as [N,G,C,...] in the working dtype, zeros after the last token.

    A token of zeros neither reads nor writes, and a log_decay of zero keeps the state: the padding leaves no trace."""
    chunks, groups, size = plan.shape(start)
    tokens = x[:, start * size : (start + chunks) * size]
    missing = chunks * size - tokens.shape[1]
    if missing:
        tokens = pad(tokens, (0, 0) * (x.ndim - 2) + (0, missing))
    if out is None:
        out = torch.empty(chunks, groups, size, *x.shape[3:], dtype=plan.dtype, device=x.device)
    _by_batch(plan, out).copy_(tokens.view(plan.batch, chunks, size, *x.shape[2:]))
    return out


def scatter(plan: Plan, start: int, x: Tensor, into: Tensor) -> None:
    """The inverse of `gather`: writes a span into its place in [B,T,H,...]."""
    tokens = into[:, start * plan.size : (start + x.shape[0]) * plan.size]
    source = _by_batch(plan, x)
    if tokens.shape[1] == x.shape[0] * plan.size:
        tokens.view(source.shape).copy_(source)
    else:
        tokens.copy_(source.flatten(1, 2)[:, : tokens.shape[1]])


def _by_batch(plan: Plan, x: Tensor) -> Tensor:
    """[N,G,C,...] seen as [B,N,C,H,...]."""
    axes = x.view(x.shape[0], plan.batch, plan.heads, *x.shape[2:])
    return axes.permute(1, 0, 3, 2, *range(4, axes.ndim))
