"""Floor 1: tensors in, tensors out. The one recurrence of every card, and the scans of the online preconditioners.

    from deltalab.kernels import delta_rule
    o, state = delta_rule(q, read_key, write_key, v, log_decay)

Shape legend of this floor: `B` batch, `T` time, `H` heads, `K` key width, `V` value width; `C` tokens a chunk, `N` chunks.
This floor knows no component, no config and no training.
"""

from __future__ import annotations

from .backends import HALF_PRECISION, backends, explain_backend, resolve_backend
from .dispatch import (
    delta_rule,
    diagonal_scan,
    gram_solve,
    hypergradient_scan,
    inverse_gram_scan,
)
from .squash import Squash
from .write_key import hypergradient_write_key, preconditioned_write_key

__all__ = [
    "HALF_PRECISION",
    "Squash",
    "backends",
    "delta_rule",
    "diagonal_scan",
    "explain_backend",
    "gram_solve",
    "hypergradient_scan",
    "hypergradient_write_key",
    "inverse_gram_scan",
    "preconditioned_write_key",
    "resolve_backend",
]
