"""The CPU backend: the recurrence as a compiled token loop, one state in the first-level cache, for training and decoding.

    from deltalab.kernels.cpu import delta_rule
    o, state = delta_rule(q, read_key, write_key, v, log_decay, initial_state, scale, dtype)

On a CPU the plain recurrence beats every chunk form: 3 to 4 multiply-adds a number of the state and token, not about 6 and a
triangular solve, any gate, nothing ill-conditioned. Numba compiles it per head width, once a machine (kept on disk).
"""

from __future__ import annotations

from .diagonal import diagonal_scan
from .hypergradient import hypergradient_scan
from .token_loop import delta_rule

__all__ = ["delta_rule", "diagonal_scan", "hypergradient_scan"]
