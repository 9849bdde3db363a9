"""`deltalab bench kernels --record FILE`: what was measured as entries of a file like `kernels/measured.yaml`.

An entry says which backend `auto` stands for, for one kind of call: (device, its name, head widths, gate, dtype). Of all shapes
of a kind the backend wins whose forward and backward take least, by the geometric mean. Not every contender can win: peers are
no backends; `fla` serves some calls only; a backend that is further off than rounding explains is refused, whatever its time.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...errors import UserError
from ...kernels.backends import Measured, read_measured
from .kernels import Row
from .rules import Rule

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 4e-3}
"""The largest relative error of a tensor that still is rounding: of sums in float32, and eight roundings of a 16-bit number."""
_RECORDED = tuple(Rule(gate) for gate in ("scalar", "none", "channel"))
"""A gate's own rule: the delta rule, the key that reads is the one that writes."""
_HEADER = """\
# Which backend `auto` stands for: the first entry that fits a call. Written by `deltalab bench kernels --record`.
"""


@dataclass(frozen=True)
class Kind:
    """What an entry is about; two entries of one kind say the same thing at different times."""

    device: str
    name: str
    key_width: int
    value_width: int
    gate: str
    dtype: str

    def is_of(self, entry: Measured) -> bool:
        """Whether `entry` is about this kind and nothing else."""
        widths = ((self.key_width,) * 2, (self.value_width,) * 2)
        return (entry.device, entry.name, entry.key_width, entry.value_width, entry.gates, entry.dtypes) == (
            self.device,
            self.name,
            *widths,
            (self.gate,),
            (self.dtype,),
        )


@dataclass(frozen=True)
class Choice:
    """The backend that won a kind, and in words what came out; refused: (backend, why) of those that were not looked at."""

    kind: Kind
    backend: str
    result: str
    refused: tuple[tuple[str, str], ...] = ()


def choices(rows: Sequence[Row], device: torch.device, dtype: torch.dtype) -> list[Choice]:
    """A choice for every kind that was measured; its `backend` is empty where every backend was refused."""
    gpu = device.type == "cuda"
    name = _literal(torch.cuda.get_device_name(device)) if gpu else "*"
    gates = {rule.name: rule.gate for rule in _RECORDED}
    found: dict[Kind, list[Row]] = {}
    for row in rows:
        if row.own and row.rule in gates:
            kind = Kind(device.type, name, row.case.K, row.case.V, gates[row.rule], str(dtype).removeprefix("torch."))
            found.setdefault(kind, []).append(row)
    return [_choice(kind, group) for kind, group in found.items()]


def _choice(kind: Kind, rows: Sequence[Row]) -> Choice:
    refused, means = [], {}
    for backend in dict.fromkeys(row.name for row in rows):
        own = [row for row in rows if row.name == backend]
        if why := _fault(own, kind.dtype):
            refused.append((backend, why))
        else:
            means[backend] = math.exp(statistics.fmean(math.log(row.median("both")) for row in own))
    if not means:
        return Choice(kind, "", "", tuple(refused))
    order = sorted(means, key=lambda backend: means[backend])
    shapes = ", ".join(str(row.case) for row in rows if row.name == order[0])
    others = [f"{means[other] / means[order[0]]:.2f} times as fast as {other}" for other in order[1:]]
    largest = max(row.error for row in rows if row.name == order[0])
    rounds = min(len(row.forward) for row in rows if row.name == order[0])
    words = f"{', '.join(others) or 'no other backend'} forward and backward at {shapes} (medians of {rounds} rounds)"
    return Choice(kind, order[0], f"{words}; error {largest:.0e}", tuple(refused))


def _fault(rows: Sequence[Row], dtype: str) -> str:
    """Why a backend cannot be chosen; empty where it can."""
    for row in rows:
        if row.failure:
            return f"{row.failure} ({row.case})"
        if not row.error <= TOLERANCE[dtype]:  # NaN is not
            return f"its error is {row.error:.1e}, over {TOLERANCE[dtype]:.0e} ({row.case})"
    return ""


def check_file(file: Path) -> None:
    """Raises before the measuring what `record` would raise after it."""
    file = file.expanduser()
    _read(file)
    folder = next(parent for parent in file.parents if parent.exists())
    if file.is_dir() or not folder.is_dir() or not os.access(file if file.exists() else folder, os.W_OK):
        raise UserError(f"--record: cannot write {str(file)!r}")


def record(file: Path, found: Sequence[Choice], hardware: str, command: str, date: str = "") -> int:
    """Write the choices into `file`: in the place of earlier entries of the same kinds, before all others, which would hide them.
    Comments and the other entries stay as they are. Returns how many were written.

    Errors: `UserError` where the file holds something else, or cannot be written; it is then as it was.
    """
    file = file.expanduser()
    chosen = [choice for choice in found if choice.backend]
    if not chosen:
        return 0
    header, blocks = _read(file)
    kept = [text for entry, text in blocks if entry is None or not any(choice.kind.is_of(entry) for choice in chosen)]
    day = date or datetime.date.today().isoformat()
    new = [_entry(choice, hardware, command, day) for choice in chosen]
    _replace(file, "".join([header, *new, *kept]))
    return len(new)


def _read(file: Path) -> tuple[str, list[tuple[Measured | None, str]]]:
    """The text before the first entry; then every entry with its text, and (None, text) for comments between them."""
    if not file.exists():
        return _HEADER, []
    entries = read_measured(file)
    header, blocks = "", list[list[str]]()
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("- "):
            blocks.append([line])
        elif not blocks:
            header += f"{line}\n"
        elif line.startswith("#") or not line.strip():
            blocks.append([line])
        else:
            blocks[-1].append(line)
    texts = ["".join(f"{line}\n" for line in block) for block in blocks]
    if sum(text.startswith("- ") for text in texts) != len(entries):
        raise UserError(f"--record: {str(file)!r} is not written as one `- device: ...` block an entry, so it cannot be added to")
    each = iter(entries)
    return header, [(next(each) if text.startswith("- ") else None, text) for text in texts]


def _entry(choice: Choice, hardware: str, command: str, date: str) -> str:
    kind = choice.kind
    lines = [f"device: {kind.device}"]
    if kind.name != "*":
        lines.append(f"name: {_quoted(kind.name)}")
    lines += [
        f"backend: {choice.backend}",
        f"key_width: [{kind.key_width}, {kind.key_width}]",
        f"value_width: [{kind.value_width}, {kind.value_width}]",
        f"gates: [{kind.gate}]",
        f"dtypes: [{kind.dtype}]",
        f"date: {date}",
        f"hardware: {_quoted(hardware)}",
        f"command: {_quoted(command)}",
        f"result: {_quoted(choice.result)}",
    ]
    return "- " + "\n  ".join(lines) + "\n"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _literal(name: str) -> str:
    """A pattern that only this name fits."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _replace(file: Path, text: str) -> None:
    """All or nothing: what is written is read back before it takes the file's place."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        read_measured(temporary)
        temporary.replace(file)
    except OSError as error:
        raise UserError(f"--record: cannot write {str(file)!r}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
