"""Which backend serves a call, and why: the user's choice, or what was measured (`measured.yaml`)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from .. import yaml_file
from ..errors import UserError, unknown
from ..strict import build, check_ascending, item, option
from . import first_use, fla, triton

HALF_PRECISION = ("triton", "fla")
"""Backends that take 16-bit operands as such, under autocast too; the others make float32 of them."""
_BACKENDS = ("reference", "torch", "cpu", "triton")
_GATES = ("none", "scalar", "channel")
_DTYPES = ("float16", "bfloat16", "float32", "float64")


def backends() -> tuple[str, ...]:
    """Of this machine, those that serve every call: "reference", the definition; "torch", the chunk form on every device; "cpu",
    the compiled loop; and "triton" where there is a GPU for it. ("fla" serves some calls only, see `fla.py`.)"""
    return _BACKENDS if torch.cuda.is_available() and triton.available("cuda") else _BACKENDS[:-1]


def resolve_backend(
    name: str,
    device: torch.device | str,
    key_width: int = 0,
    value_width: int = 0,
    gate: str | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """The backend that `name` means on `device` for heads of these widths (0: any), this gate (None: any) and this dtype of the
    products' operands (None: any).

    "auto" is the fastest one as far as that was measured, see `explain_backend`. On a GPU where nothing was, it is "triton" if
    those kernels serve the call and pass a check against the chunk form at their first use (`first_use.py`), and the chunk form
    "torch" otherwise.
    Errors: `UserError` for an unknown name, and for a backend that cannot work on `device` or at these widths.
    """
    device = torch.device(device)
    if name == "auto":
        found = _measured_best(device, key_width, value_width, gate, dtype)
        return _unmeasured(device, key_width, value_width, gate, dtype) if found is None else found.backend
    every = (*_BACKENDS, "fla")
    if name not in every:
        raise unknown("backend", name, ("auto", *every), "backend")
    serves = {"cpu": device.type == "cpu", "triton": triton.available(device), "fla": fla.available(device)}
    if device.type != "meta" and not serves.get(name, True):
        valid = ", ".join(("auto", "reference", "torch", *(other for other, fits in serves.items() if fits)))
        why = f" ({fla.REQUIREMENT})" if name == "fla" else ""
        raise UserError(f"backend: {name!r} cannot work on {device}{why}. Valid there: {valid}")
    if name == "triton" and max(key_width, value_width) > triton.LONGEST_WIDTH:
        raise UserError(
            f"backend: 'triton' serves heads of at most {triton.LONGEST_WIDTH}, got {key_width} x {value_width}. "
            "Valid: auto, torch"
        )
    return name


def explain_backend(
    name: str,
    device: torch.device | str,
    key_width: int = 0,
    value_width: int = 0,
    gate: str | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """`resolve_backend`'s answer and its reason, in one line:

    explain_backend("auto", "cpu", 64, 64)
    'cpu: measured 2026-11-24 on two cores of ... by `deltalab bench kernels ...`: 1.8 to 3.4 times as fast as torch ...'
    """
    chosen = resolve_backend(name, device, key_width, value_width, gate, dtype)
    if name != "auto":
        return f"{chosen}: asked for by name"
    device = torch.device(device)
    found = _measured_best(device, key_width, value_width, gate, dtype)
    if found is None:
        where = f"{device.type} ({torch.cuda.get_device_name(device)})" if _is_gpu(device) else device.type
        what = f"heads of {key_width} x {value_width}" if key_width and value_width else "this kind of call"
        why = "it computes the same here, and was not measured" if chosen == "triton" else "it works on every device"
        return f"{chosen}: {why}; nothing faster was measured for {what} on {where}"
    return f"{chosen}: measured {found.date} on {found.hardware} by `{found.command}`: {found.result}"


@dataclass(frozen=True)
class Measured:
    """One entry of `measured.yaml`."""

    device: str = option(choices=("cpu", "cuda"))
    backend: str = option(choices=(*_BACKENDS, "fla"))
    date: str = option(help="when it was measured")
    hardware: str = option(help="on what")
    command: str = option(help="how to measure it again")
    result: str = option(help="what came out")
    name: str = option("*", "pattern of the GPU's name")
    key_width: tuple[int, int] = option((0, 1 << 30), "lowest and highest")
    value_width: tuple[int, int] = option((0, 1 << 30), "lowest and highest")
    gates: tuple[str, ...] = option(_GATES, choices=_GATES)
    dtypes: tuple[str, ...] = option(_DTYPES, choices=_DTYPES)

    def __post_init__(self) -> None:
        check_ascending("key_width", self.key_width)
        check_ascending("value_width", self.value_width)

    def fits(self, device: torch.device, K: int, V: int, gate: str | None, dtype: torch.dtype | None) -> bool:
        """What a call does not say fits only an entry that is about everything in that respect."""
        gates, dtypes = (_GATES if gate is None else (gate,)), (_DTYPES if dtype is None else (str(dtype).split(".")[-1],))
        widths = ((K, self.key_width), (V, self.value_width))
        return (
            device.type == self.device
            and (self.name == "*" or (_is_gpu(device) and fnmatchcase(torch.cuda.get_device_name(device), self.name)))
            and all(low <= width <= high for width, (low, high) in widths)
            and set(gates) <= set(self.gates)
            and set(dtypes) <= set(self.dtypes)
        )


def read_measured(file: Path) -> tuple[Measured, ...]:
    """The entries of such a file, in its order."""
    content = yaml_file.read(file)
    return tuple(build(Measured, entry, item(file.name, index)) for index, entry in enumerate(content or []))


@functools.cache
def _measured() -> tuple[Measured, ...]:
    return read_measured(Path(__file__).with_name("measured.yaml"))


@functools.lru_cache(maxsize=256)
def _measured_best(device: torch.device, K: int, V: int, gate: str | None, dtype: torch.dtype | None) -> Measured | None:
    can = {"triton": lambda: triton.available(device) and max(K, V) <= triton.LONGEST_WIDTH, "fla": lambda: fla.available(device)}
    for entry in _measured():
        if entry.fits(device, K, V, gate, dtype) and can.get(entry.backend, lambda: True)():
            return entry
    return None


def _unmeasured(device: torch.device, K: int, V: int, gate: str | None, dtype: torch.dtype | None) -> str:
    """A call that does not say its widths may be of any, also of those that only the chunk form serves."""
    operand = torch.float32 if dtype is None else dtype
    working = torch.promote_types(operand, torch.float32)
    if not (triton.available(device) and triton.supports(working, K, V)):
        return "torch"
    return "triton" if first_use.holds(device, K, V, gate or "scalar", operand) else "torch"


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_available()
