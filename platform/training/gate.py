"""The gate before training: does the backend compute, on this machine, what the card says?

    verified = pass_gate(spec, width, heads, backend, device, cache)        # "cpu: 3.1e-07 of 5.2e-06 (y)", or WrongKernel

Every different recurrent layer is run once at its real head widths, on a short sequence and a few heads, and held against the
definition (`verification`): output and all gradients. A pass is kept in `cache`, under everything that it depends on, so that the
next trial of the same kind pays a look at a file. A miss is not kept: it is looked into again.

Most backends work in float32 whatever a trial's precision is, so it is there that they are held; those that take bf16 operands
are held in the trial's own precision. No global generator is touched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import cast

import torch

from ...kernels import HALF_PRECISION, resolve_backend
from ...recurrences import AttentionSpec, LayerSpec, MixerSpec, layers_of, with_block
from ...recurrences.mixer import head_shape
from ...registry import origins
from ...strict import plain
from .verification import Laboratory, Verdict

_WIDTH, _HEADS, _BATCH = 256, 2, 2
"""A model's width, heads and batch at the gate, at most: only the widths of a head decide which kernel runs."""
_TOKENS, _FEWER_TOKENS = 130, 70
"""Three chunks of the chunk form and five blocks of the compiled loop; fewer, and one head, for large heads: the definition keeps
several float64 states of every token."""
_LARGE = 128 * 128
_ALLOWED = {"fp32": 64.0, "bf16": 8.0}
"""More than `deltalab verify` allows: a gradient of two or three numbers can be that unlucky once in some thousand draws,
and a kernel that is wrong is off by thousands of roundings."""
_FOLDERS = ("kernels", "recurrences")
_PACKAGES = ("torch", "triton", "numba", "numpy")


class WrongKernel(Exception):  # noqa: N818
    """A backend that is further from the definition than rounding explains. The trial fails; its numbers would mean nothing."""


def pass_gate(
    spec: MixerSpec, width: int, heads: int, backend: str, device: torch.device, cache: Path, precision: str = "fp32"
) -> str:
    """The verdict that is closest to its limit, as words; empty where there is only one implementation (softmax attention, the
    definition itself). Raises `WrongKernel`, naming tensor, error and limit."""
    verdicts = []
    for layer in dict.fromkeys(layers_of(spec)):
        shape = head_shape(width, heads, layer.block)
        operand = torch.bfloat16 if precision == "bf16" else torch.float32
        resolved = resolve_backend(backend, device, shape.key, shape.value, dtype=operand)
        if isinstance(layer, AttentionSpec) or resolved == "reference":
            continue
        own = precision if resolved in HALF_PRECISION else "fp32"
        verdicts.append(_verdict(_reduced(layer, width, heads), resolved, device, own, cache))
    return str(max(verdicts, key=lambda verdict: verdict.error / verdict.limit)) if verdicts else ""


def _verdict(laboratory: Laboratory, backend: str, device: torch.device, precision: str, cache: Path) -> Verdict:
    """From the cache, or measured."""
    file = cache / "verified" / f"{_key(laboratory, backend, device, precision)}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Verdict(**json.loads(file.read_text()))
    name = laboratory.layer.name
    standard = laboratory.standard(_ALLOWED[precision], precision)
    verdict = standard.judge(name, backend, laboratory.outcome(backend, device, precision))
    if not verdict.passed:
        shape = head_shape(laboratory.width, laboratory.heads, laboratory.layer.block)
        raise WrongKernel(
            f"the backend {backend!r} does not compute {name} on this machine: {verdict.tensor} is off by {verdict.error:.1e}, "
            f"allowed {verdict.limit:.1e} (heads of {shape.key} x {shape.value}, {precision}). "
            "`deltalab verify` shows every backend; training.backend chooses another"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(dataclasses.asdict(verdict)))
    temporary.replace(file)
    return verdict


def _reduced(layer: LayerSpec, width: int, heads: int) -> Laboratory:
    """The layer with its own widths of a head, in a narrow model of few heads (as many to a key head as it has)."""
    shape, block = head_shape(width, heads, layer.block), layer.block
    ratio = heads // (block.key_heads or heads)
    large = shape.key * shape.value > _LARGE
    groups = min(heads // ratio, 1 if large else _HEADS)
    changes = {"head_width": shape.key, "key_heads": groups if block.key_heads else 0}
    reduced = cast(LayerSpec, with_block(layer, changes))
    return Laboratory(reduced, min(width, _WIDTH), groups * ratio, 1 if large else _BATCH, _FEWER_TOKENS if large else _TOKENS)


def _key(laboratory: Laboratory, backend: str, device: torch.device, precision: str) -> str:
    """Whatever the verdict depends on, hashed."""
    layer = laboratory.layer
    content = {
        "layer": layer.effective(),
        "plugins": origins(layer),
        "sizes": [laboratory.width, laboratory.heads, laboratory.batch, laboratory.tokens, laboratory.seed],
        "backend": backend,
        "precision": precision,
        "code": _code(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "machine": [_processor(), torch.cuda.get_device_name(device) if device.type == "cuda" else ""],
    }
    text = json.dumps(plain(content), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@functools.cache
def _code() -> str:
    """A digest of the kernels and of what stands between them and a layer."""
    digest, root = hashlib.sha256(), Path(__file__).resolve().parents[2]
    for file in sorted(file for folder in _FOLDERS for end in ("py", "yaml") for file in (root / folder).rglob(f"*.{end}")):
        digest.update(f"{file.relative_to(root).as_posix()}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


@functools.cache
def _processor() -> str:
    """What compiled code depends on of a CPU: its model, and the vector instructions that torch uses."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return f"{model} {torch.backends.cpu.get_cpu_capability()}"
