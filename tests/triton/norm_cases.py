"""The norms and SwiGLU products that run in Triton's interpreter, and the faults that must be found. Imports neither torch nor
triton."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Norm:
    """Rows of N numbers, `shape` of them, the last axis being heads where there is a gate."""

    shape: tuple[int, ...] = (2, 35, 2)
    N: int = 24
    activation: str = "none"
    dtype: str = "float32"
    gate_dtype: str = "float32"
    result: str = "float32"
    eps: float = 1e-3
    programs: int = 512
    """Of the backward pass at most."""
    turned: bool = False
    """x, and the gradient of the result, with the first two axes exchanged in memory."""
    fault: str | None = None

    @property
    def name(self) -> str:
        gate = [] if self.activation == "none" else [self.activation, self.gate_dtype]
        words = ["norm", "x".join(map(str, self.shape)), f"N{self.N}", self.dtype, *gate, f"to-{self.result}"]
        words += [f"eps{self.eps:g}"] * (self.eps != 1e-3) + [f"programs{self.programs}"] * (self.programs != 512)
        return "-".join(words + ["turned"] * self.turned) + (f" {self.fault}" if self.fault else "")


@dataclass(frozen=True)
class Sum:
    """x + more and its norm, of which `used` have a gradient."""

    shape: tuple[int, ...] = (3, 47)
    N: int = 24
    dtype: str = "float32"
    more_dtype: str = "float32"
    result: str = "float32"
    used: str = "both"
    fault: str | None = None

    @property
    def name(self) -> str:
        words = ["sum", "x".join(map(str, self.shape)), f"N{self.N}", self.dtype, self.more_dtype, f"to-{self.result}", self.used]
        return "-".join(words) + (f" {self.fault}" if self.fault else "")


@dataclass(frozen=True)
class Product:
    """Rows of 2C numbers."""

    shape: tuple[int, ...] = (3, 47)
    C: int = 24
    dtype: str = "float32"
    turned: bool = False
    fault: str | None = None

    @property
    def name(self) -> str:
        words = ["swiglu", "x".join(map(str, self.shape)), f"C{self.C}", self.dtype]
        return "-".join(words + ["turned"] * self.turned) + (f" {self.fault}" if self.fault else "")


def _norms() -> list[Norm]:
    found = []
    for activation in ("none", "silu", "sigmoid"):
        gated = Norm(activation=activation)
        # Several rows a tile and several programs, the last of each ragged; one row a tile; one row at all; none.
        found += [gated, replace(gated, shape=(300, 2)), replace(gated, shape=(5, 5), N=704), replace(gated, shape=(1, 1))]
        found += [
            replace(gated, shape=(9, 1), N=1000),
            replace(gated, shape=(2, 0, 3)),
            replace(gated, shape=(300, 2), programs=2),
        ]
        found += [replace(gated, dtype="float16", gate_dtype="float16", result="float16"), replace(gated, N=96)]
        found += [replace(gated, turned=True), replace(gated, eps=0.0), replace(gated, N=1), replace(gated, N=256)]
    for activation in ("none", "silu"):
        found.append(Norm(activation=activation, gate_dtype="float16", result="float16"))
        found.append(Norm(activation=activation, dtype="float16"))
    found += [Norm(shape=(2,), N=8192), Norm(shape=(9,), N=2000)]
    return found


def _sums() -> list[Sum]:
    found = []
    for used in ("both", "sum", "norm"):
        found += [Sum(used=used), Sum(used=used, more_dtype="float16", result="float16")]
        found.append(Sum(used=used, dtype="float16", more_dtype="float16", result="float16", N=96))
    found += [Sum(dtype="float16"), Sum(shape=(600,)), Sum(shape=(21,), N=704), Sum(shape=(0,)), Sum(shape=(1,)), Sum((5,), 5000)]
    return found


def _products() -> list[Product]:
    found = [Product(dtype=dtype, C=C) for dtype in ("float32", "float16") for C in (1, 24, 96, 704)]
    return [*found, Product(shape=(1,)), Product(shape=(2, 0)), Product(turned=True), Product(shape=(2,), C=2731)]


NORMS, SUMS, PRODUCTS = _norms(), _sums(), _products()

UNSERVED = [
    Norm(dtype="float64", result="float64"),
    Norm(result="float64"),
    Norm(activation="silu", gate_dtype="float64"),
    Norm(shape=(1,), N=8193),
    Norm(shape=(1, 1), N=1025, activation="silu"),
    Sum(dtype="float64", more_dtype="float64", result="float64"),
    Product(dtype="float64"),
]
"""Left to torch: no launch."""

_LONG = Norm(shape=(300, 2), activation="silu")
PLANTED = [
    *(
        replace(_LONG, fault=fault)
        for fault in ("a part of dw left out", "eps forgotten", "last row left out", "a tile not walked")
    ),
    replace(_LONG, fault="slope of the other gate"),
    replace(_LONG, activation="none", fault="mean over one number more"),
    *(Sum(fault=fault) for fault in ("gradient of the sum forgotten", "sum of another row", "eps forgotten")),
    Sum(more_dtype="float16", fault="gradient of more a row late"),
    Product(fault="halves exchanged"),
    Product(C=704, fault="last block left out"),
]
