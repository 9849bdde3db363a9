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
    lengths: tuple[int, ...] = ()
    """Of packed sequences; T is their sum."""

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
        parts += ["packed"] if self.lengths else []
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
    # float32 states of wide heads are two tiles.
    found.append(Case("scalar", True, "float32", T=18, K=136, V=16, H=1))
    found.append(Case("channel", False, "float32", T=18, K=136, V=16, H=1))
    found.append(Case("none", True, "float32", T=18, K=136, V=16, H=1))
    for gate in ("scalar", "channel"):
        # Several blocks of key and value channels, the last one partly masked; a gate that resets (log_decay -inf).
        found.append(Case(gate, True, "float32", T=18, K=72, V=80, H=1))
        found.append(Case(gate, True, "float32", reset=True))
    return found


LENGTHS = (1, 0, 18, 16, 0)
"""Below, at and beyond a chunk of 16, with empty sequences between and at the end."""


def _packed() -> list[Case]:
    whole = Case("none", True, "float32", T=sum(LENGTHS), lengths=LENGTHS)
    found = [replace(whole, gate=gate, erase=erase) for gate in GATES for erase in (True, False)]
    found += [replace(whole, gate=gate, dtype="float16", state=False, H=1) for gate in GATES]
    found.append(replace(whole, gate="scalar", reset=True, H=1))
    short = (3, 0, 11, 1)
    found += [replace(whole, gate=gate, T=sum(short), lengths=short, gradients=False) for gate in GATES]
    return found


CASES = _everything() + _corners() + _packed()

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
PLANTED += [
    Case(gate, True, "float32", T=sum(LENGTHS), lengths=LENGTHS, fault="a sequence starts one token late") for gate in GATES
]


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
    lengths: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        words = [word for word in ("gate", "aware", "anchor", "reset") if getattr(self, word)]
        words += ["packed"] if self.lengths else []
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
    Scan("diagonal", gate=True, T=sum(LENGTHS), lengths=LENGTHS),
    Scan("diagonal", gate=False, T=70, lengths=(40, 0, 30)),
    Scan("hypergradient", gate=True, aware=True, anchor=True, box=(0.9, 1.1), T=sum(LENGTHS), lengths=LENGTHS),
]
PLANTED_SCANS = [
    Scan("diagonal", gate=True, T=sum(LENGTHS), lengths=LENGTHS, fault="a sequence starts one token late"),
    Scan("diagonal", gate=True, fault="gradient one row late"),
    Scan("hypergradient", gate=True, aware=True, box=(0.9, 1.1), fault="box a little wider"),
]


@dataclass(frozen=True)
class Write:
    """One call of the fused preconditioner: from key to write key."""

    squash: str = "softsign"
    interval: str = "symmetric"
    exponent: float = 1.0
    gate: bool = True
    gain: bool = False
    beta: bool = True
    dtype: str = "float32"
    T: int = 41
    K: int = 24
    lengths: tuple[int, ...] = ()
    reset: bool = False
    fault: str | None = None

    @property
    def name(self) -> str:
        words = [word for word in ("gate", "gain", "beta", "reset") if getattr(self, word)] + ["packed"] * bool(self.lengths)
        name = "-".join(["write", self.squash, self.interval, self.dtype, *words, f"T{self.T}", f"K{self.K}"])
        return name + (f" {self.fault}" if self.fault else "")


WRITES = [
    Write(),
    Write(gain=True, K=72),
    Write(gate=False, beta=False, T=70),
    Write(squash="tanh", interval="below", exponent=2.0),
    Write(squash="none", exponent=0.3, gain=True, gate=False),
    Write(interval="above", reset=True, T=5),
    Write(interval="below", gain=True, T=sum(LENGTHS), lengths=LENGTHS),
    Write(dtype="float16", gain=True),
]
PLANTED_WRITES = [
    Write(fault="a chunk's sum left out", T=70),
    Write(fault="squash a little steeper"),
    Write(fault="a sequence starts one token late", T=sum(LENGTHS), lengths=LENGTHS),
]


@dataclass(frozen=True)
class Hypergradient:
    """One call of the hypergradient's fused write key."""

    beta: bool = True
    step: bool = False
    aware: bool = False
    gate: bool = False
    anchor: bool = False
    box: tuple[float, float] | None = None
    every: int = 1
    dtype: str = "float32"
    T: int = 41
    K: int = 24
    B: int = 1
    H: int = 2
    lengths: tuple[int, ...] = ()
    reset: bool = False
    fault: str | None = None

    @property
    def name(self) -> str:
        words = [word for word in ("beta", "step", "aware", "gate", "anchor", "reset") if getattr(self, word)]
        words += [f"box{self.box[0]:g}-{self.box[1]:g}-every{self.every}"] if self.box else []
        words += ["packed"] if self.lengths else []
        name = "-".join(["write-hypergradient", self.dtype, *words, f"B{self.B}", f"T{self.T}", f"K{self.K}"])
        return name + (f" {self.fault}" if self.fault else "")


def _everything_about_d() -> list[Hypergradient]:
    box, full = (0.9, 1.1), Hypergradient(step=True, aware=True, gate=True, anchor=True)
    bounded = replace(full, box=box)
    found = [full, bounded, Hypergradient(), Hypergradient(beta=False, box=box)]
    found += [replace(case, dtype="float16", H=1) for case in (full, bounded)]
    # Ends after one, two, three and four of four tokens that the box cuts; one token.
    found += [Hypergradient(box=box, T=T, H=1) for T in (5, 6, 7, 8, 1)]
    # The box after every few tokens alone, which need not be the last of four.
    found += [Hypergradient(box=box, every=every, gate=True, H=1) for every in (3, 16)]
    found += [Hypergradient(box=(0.0, math.inf), T=35, K=72, H=1), replace(full, T=33, B=2, H=1)]
    found += [replace(bounded, reset=True, H=1), replace(full, reset=True, H=1)]
    # Longer than a chunk, of 32 tokens; empty sequences between.
    found += [replace(case, T=sum(LENGTHS), lengths=LENGTHS) for case in (full, bounded)]
    found.append(replace(bounded, T=40, lengths=(3, 37), H=1))
    return found


HYPERGRADIENTS = _everything_about_d()
PLANTED_HYPERGRADIENTS = [
    Hypergradient(box=(0.9, 1.1), fault="box a little wider"),
    Hypergradient(box=(0.9, 1.1), fault="box forgotten on the way back"),
    Hypergradient(fault="a chunk entered with nothing"),
    Hypergradient(gate=True, T=sum(LENGTHS), lengths=LENGTHS, fault="a sequence starts one token late"),
]
