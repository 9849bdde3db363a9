"""Rows that hold several documents, each read by itself: what one document left behind, the next does not see.

Exact for every recurrence and for attention, whatever they carry (memory, statistics, convolution, positions): the documents are
taken out of their rows, read from an empty state, and put back. Documents of like length are read together, padded on the right,
where nothing that is kept looks: less than twice the tokens, in about log2 T calls.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def read_by_document(read: Callable[[Tensor], Tensor], tokens: Tensor, starts: Tensor) -> Tensor:
    """`read`: tokens [n,L] -> hidden [n,L,D] from an empty state. Returns hidden [B,T,D] of tokens [B,T].

    starts: bool [B,T], true where a document begins; a row begins one anyway.
    """
    if not bool(starts[:, 1:].any()):
        return read(tokens)
    B, T = tokens.shape
    begins = starts.to(tokens.device).clone()
    begins[:, 0] = True
    first = begins.flatten().nonzero()[:, 0]
    length = torch.diff(first, append=first.new_tensor([B * T]))
    # 1, 2, 3-4, 5-8, ...: the padded length is less than twice the document's.
    octave = torch.ceil(torch.log2(length.double())).long()
    hidden, places = [], []
    for size in sorted(set(octave.tolist())):
        mine = octave == size
        offset = torch.arange(int(length[mine].max()), device=tokens.device)
        place = first[mine, None] + offset
        inside = offset < length[mine, None]
        rows = tokens.flatten()[place.clamp(max=B * T - 1)]
        hidden.append(read(rows)[inside])
        places.append(place[inside])
    order = torch.argsort(torch.cat(places))
    found = torch.cat(hidden).index_select(0, order)
    return found.view(B, T, found.shape[-1])
