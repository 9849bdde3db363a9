"""What else computes the gated delta rule on this machine: our own backends, and peers where they are installed.

A contender is a function (q, k, v, beta, log_decay) -> o, all [B,T,H,.], with k of norm 1 and one decay per head.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...kernels import backends, delta_rule

Contender = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def contenders(device: torch.device) -> dict[str, Contender]:
    """Name -> contender: our backends (the definition left out: it is there to be right), then the peers that are installed."""
    found: dict[str, Contender] = {}
    for name in backends():
        if name != "reference" and (name != "cpu" or device.type == "cpu"):
            found[name] = functools.partial(_ours, backend=name)
    if importlib.util.find_spec("transformers") is not None:
        found["transformers"] = _transformers
    if _fla_naive_file() is not None:
        found["fla-naive"] = _fla_naive
    return found


def peer_versions() -> dict[str, str]:
    """Package -> version of the peers that are installed."""
    found = {}
    for package in ("transformers", "fla-core", "flash-linear-attention"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _ours(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, backend: str) -> Tensor:
    return delta_rule(q, k, beta[..., None] * k, v, log_decay, backend=backend)[0]


@functools.cache
def _transformers_function() -> Callable[..., Any]:
    from transformers.models.qwen3_next import modeling_qwen3_next as module

    # With flash-linear-attention installed the name is bound to GPU code; what it wraps is the plain PyTorch form.
    function: Callable[..., Any] = inspect.unwrap(module.torch_chunk_gated_delta_rule)
    return function


def _transformers(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
    o: Tensor = _transformers_function()(q, k, v, g=log_decay, beta=beta)[0]
    return o


def _fla_naive_file() -> Path | None:
    try:
        files = importlib.metadata.files("fla-core") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    wanted = "fla/ops/gated_delta_rule/naive.py"
    return next((Path(str(file.locate())) for file in files if file.as_posix() == wanted), None)


@functools.cache
def _fla_naive_function() -> Callable[..., Any]:
    """Loaded from its file: the package's import takes seconds and wants Triton."""
    file = _fla_naive_file()
    assert file is not None, "contenders() has looked"
    spec = importlib.util.spec_from_file_location("fla_naive_gated_delta_rule", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function: Callable[..., Any] = module.naive_chunk_gated_delta_rule
    return function


def _fla_naive(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
    o: Tensor = _fla_naive_function()(q, k, v, g=log_decay, beta=beta)[0]
    return o
