"""The configurations that run in Triton's interpreter, and the faults that must be found. Imports neither torch nor triton."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

GATES = ("none", "scalar", "channel")


@dataclass(frozen=True)
class Case:
    """One call. `K` and `V` are no powers of two where masks matter; T is ragged in chunks of `chunk` tokens."""

    gate: str
    erase: bool
    dtype: str
    T: int = 41
    K: int = 24
    V: int = 20
    chunk: int = 16
    B: int = 1
    H: int = 2
    state: bool = True
    reset: bool = False
    fault: str | None = None
    gradients: bool = True

    @property
    def name(self) -> str:
        parts = [
            self.gate,
            "erase" if self.erase else "add",
            self.dtype,
            f"T{self.T}",
            f"K{self.K}",
            f"V{self.V}",
            f"C{self.chunk}",
        ]
        parts += [word for word, on in (("state", self.state), ("reset", self.reset), ("forward", not self.gradients)) if on]
        return "-".join(parts) + (f" {self.fault}" if self.fault else "")


def _everything() -> list[Case]:
    """Every gate, with and without erase, in both dtypes; with a state over a ragged end, and without one over whole chunks."""
    found = []
    for gate in GATES:
        for erase in (True, False):
            for dtype in ("float32", "float16"):
                found.append(Case(gate, erase, dtype))
                found.append(Case(gate, erase, dtype, T=32, K=16, V=32, state=False))
    return found


def _corners() -> list[Case]:
    found = []
    for gate in GATES:
        full = Case(gate, True, "float32")
        # Four strips in a chunk, as on a GPU; two rows of a batch and one head; a length below a sub-chunk; one token.
        found.append(replace(full, T=83, K=16, V=16, chunk=64))
        found.append(replace(full, T=19, B=2, H=1, state=False))
        found.append(replace(full, T=5))
        found.append(replace(full, T=1))
        # Without gradients and up to 16 tokens: the recurrent kernel.
        found.extend(
            replace(full, T=11, erase=erase, dtype=dtype, gradients=False)
            for erase in (True, False)
            for dtype in ("float32", "float16")
        )
        found.append(replace(full, T=1, gradients=False, state=False))
    for gate in ("scalar", "channel"):
        # Several blocks of key and value channels, the last one partly masked; a gate that resets (log_decay -inf).
        found.append(Case(gate, True, "float32", T=18, K=72, V=80, H=1))
        found.append(Case(gate, True, "float32", reset=True))
    return found


CASES = _everything() + _corners()

FAULTS = {
    "decay off by one row": ("scalar", "channel"),
    "diagonal included in M": GATES,
    "inverse wrong by 1e-4": GATES,
    "states one chunk late": GATES,
    "last token left out": GATES,
    "decay gradient without the state's part": ("scalar", "channel"),
}
PLANTED = [
    Case(gate, True, "float32", fault=fault, gradients=fault != "last token left out")
    for fault, gates in FAULTS.items()
    for gate in gates
]  # fmt: skip


@dataclass(frozen=True)
class Scan:
    """One call of a preconditioner's scan; `box` and `every` are the hypergradient's."""

    kind: str
    gate: bool
    aware: bool = False
    anchor: bool = False
    box: tuple[float, float] | None = None
    every: int = 1
    T: int = 41
    K: int = 24
    reset: bool = False
    fault: str | None = None

    @property
    def name(self) -> str:
        words = [word for word in ("gate", "aware", "anchor", "reset") if getattr(self, word)]
        box = [f"box{self.box[0]:g}to{self.box[1]:g}every{self.every}"] if self.box else []
        return "-".join(["scan", self.kind, *words, *box, f"T{self.T}", f"K{self.K}"]) + (f" {self.fault}" if self.fault else "")


SCANS = [
    Scan("diagonal", gate=False),
    Scan("diagonal", gate=True),
    Scan("diagonal", gate=True, reset=True, K=40),
    Scan("diagonal", gate=True, T=1),
    Scan("hypergradient", gate=False),
    Scan("hypergradient", gate=True, aware=True, anchor=True, K=40),
    Scan("hypergradient", gate=True, box=(0.0, math.inf)),
    Scan("hypergradient", gate=True, aware=True, anchor=True, box=(0.9, 1.1)),
    Scan("hypergradient", gate=False, aware=True, box=(0.95, 1.05), every=8),
    Scan("hypergradient", gate=True, T=1),
]
PLANTED_SCANS = [
    Scan("diagonal", gate=True, fault="gradient one row late"),
    Scan("hypergradient", gate=True, aware=True, box=(0.9, 1.1), fault="box a little wider"),
]
