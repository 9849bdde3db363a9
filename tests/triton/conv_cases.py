"""The short convolutions that run in Triton's interpreter, and the faults that must be found. Imports no torch, no triton."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Convolution:
    """One call of `convolved_heads`. The interpreted tiles are 8 tokens of 128 channels, and walks 16 rows long."""

    sizes: tuple[int, ...] = (48, 48, 40)
    units: tuple[int, ...] = (24, 24, 0)
    B: int = 2
    T: int = 19
    W: int = 4
    past: bool = True
    silu: bool = True
    dtype: str = "float32"
    out: str | None = None
    strided: bool = False
    """x is a transposed view, and the outputs' gradients are expanded numbers."""
    unused: int | None = None
    """An output that no gradient comes from."""
    fault: str | None = None

    @property
    def name(self) -> str:
        parts = [f"{size}:{unit}" for size, unit in zip(self.sizes, self.units, strict=True)]
        parts += [self.dtype, f"to {self.out}" if self.out else "", f"B{self.B} T{self.T} W{self.W}"]
        words = (("past", self.past), ("silu", self.silu), ("strided", self.strided), ("unused", self.unused is not None))
        return " ".join([*filter(None, parts), *(word for word, on in words if on)]) + (f" {self.fault}" if self.fault else "")


def _both(case: Convolution) -> list[Convolution]:
    return [case, replace(case, dtype="float16", out="float16")]


CONVOLUTIONS = (
    *_both(Convolution()),
    *_both(Convolution(past=False, silu=False)),
    Convolution(dtype="float16"),
    Convolution(out="float16", B=1),
    Convolution((32, 32, 16), (16, 16, 16), B=1, T=33),
    Convolution((96, 192), (96, 0), B=1, T=9, past=False),
    Convolution((64, 128, 256), (64, 128, 256), B=1, T=6),
    Convolution((320,), (160,), B=1, T=7, dtype="float16", out="float16"),  # heads that no power of two is
    Convolution((200,), (0,), T=17),  # two tiles of channels, the second one ragged
    Convolution((200,), (0,), T=17, silu=False, dtype="float16", out="float16"),
    Convolution((8, 6, 5, 1), (4, 0, 5, 1), B=1, T=10, past=False),
    *(Convolution((20, 12), (10, 0), T=T, past=past) for T in (1, 2, 3, 13) for past in (True, False)),
    *(Convolution((20, 12), (10, 0), W=W, past=past) for W in (2, 3, 8) for past in (True, False)),
    Convolution((20, 12), (10, 0), W=1, past=False),
    *_both(Convolution((20, 12), (10, 0), B=1, T=3, W=8)),
    Convolution((20, 12), (10, 0), B=1, T=1, W=1, past=False),
    Convolution((20, 12), (10, 0), strided=True),
    Convolution((20, 12), (10, 0), unused=0),
    Convolution((20, 12), (10, 0), unused=1, dtype="float16", out="float16"),
)

PLANTED_CONVOLUTIONS = tuple(
    replace(case, fault=fault)
    for case in _both(Convolution((20, 12), (10, 0)))
    for fault in (
        "past forgotten",
        "taps in reverse",
        "eps a tenth larger",
        "one head not normalised",
        "last program not started",
        "last token left out",
        "activation forgotten on the way back",
        "norm forgotten on the way back",
        "past without a gradient",
        "a walk's last row wrong by a hundredth",
        "a walk's sum left out",
        "the rows after a walk counted twice",
    )
)
