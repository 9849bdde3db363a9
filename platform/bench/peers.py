"""What computes a rule on this machine: our own backends, and peers where they are installed.

A contender is a function of the rule's inputs (`rules.draw`) that returns o [B,T,H,V].
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError, unknown
from ...kernels import backends
from .rules import GDN, Inputs, Rule, ours

COMPILED = "transformers-compiled"
FLA = "fla"
PEERS = ("transformers", "fla-naive", COMPILED, FLA)


@dataclass(frozen=True)
class Contender:
    """A name's function. own: a backend of ours. normalises: it divides q and k by their norms first, so that its time counts
    that, and its error is against the same. between: called before the first run at another shape."""

    run: Callable[[Inputs], Tensor]
    own: bool = False
    normalises: bool = False
    between: Callable[[], None] = lambda: None


def contenders(device: torch.device, rule: Rule = GDN, peers: tuple[str, ...] = ()) -> dict[str, Contender]:
    """Name -> contender: our backends (the definition left out: it is there to be right), then the peers that are installed and
    compute the rule. `peers` are those that run on request alone: `transformers-compiled`, and `fla` where there is no GPU.

    Errors: `UserError` for a name in `peers` that is none, and for one that cannot run on `device`.
    """
    for name in peers:
        _check(name, device)
    found = {
        name: Contender(functools.partial(ours, rule, backend=name), own=True)
        for name in backends()
        if name != "reference" and (name != "cpu" or device.type == "cpu")
    }
    if rule == GDN:
        if _installed("transformers"):
            found["transformers"] = Contender(lambda x: _transformers_form(_transformers_function(), x))
        if _fla_naive_file() is not None:
            found["fla-naive"] = Contender(lambda x: _transformers_form(_fla_naive_function(), x))
        if COMPILED in peers:
            found[COMPILED] = Contender(_compiled, between=_forget_compiled)
    if (device.type == "cuda" and _installed("fla")) or FLA in peers:
        kernel = _FLA_KERNELS.get(rule)
        if kernel is not None:
            found[FLA] = Contender(functools.partial(_fla, kernel), normalises=rule.preconditioner != "none")
    return found


def peer_versions() -> dict[str, str]:
    """Package -> version of the peers that are installed."""
    found = {}
    for package in ("transformers", "fla-core", "flash-linear-attention"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _check(name: str, device: torch.device) -> None:
    if name not in PEERS:
        raise unknown("peer", name, PEERS, "--peers")
    package = {FLA: "fla", "fla-naive": "fla"}.get(name, "transformers")
    if not _installed(package):
        wanted = "flash-linear-attention" if package == "fla" else package
        raise UserError(f"--peers: {name!r} needs the package {wanted}, which is not installed (pip install {wanted})")
    if name == FLA and device.type != "cuda":
        raise UserError(
            f"--peers: {name!r} is flash-linear-attention's Triton kernels, which need an NVIDIA GPU; "
            f"--device is {str(device)!r}. Valid there: fla-naive"
        )


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _transformers_form(function: Callable[..., Any], x: Inputs) -> Tensor:
    o: Tensor = function(x["q"], x["k"], x["v"], g=x["log_decay"], beta=x["beta"])[0]
    return o


@functools.cache
def _transformers_function() -> Callable[..., Any]:
    # It imports flash-linear-attention where that is installed, which warns on a machine without a GPU.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.models.qwen3_next import modeling_qwen3_next as module

    # With flash-linear-attention installed the name is bound to GPU code; what it wraps is the plain PyTorch form.
    function: Callable[..., Any] = inspect.unwrap(module.torch_chunk_gated_delta_rule)
    return function


@functools.cache
def _compiled_function() -> Callable[..., Any]:
    return torch.compile(_transformers_function(), dynamic=False)


def _compiled(x: Inputs) -> Tensor:
    # Where dynamo would give up and run eagerly, without a word, it has to say so: the row then shows why.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        return _transformers_form(_compiled_function(), x)


def _forget_compiled() -> None:
    """Every shape is compiled for itself: dynamo would go over to dynamic shapes, and after eight to eager mode."""
    torch._dynamo.reset()


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


@dataclass(frozen=True)
class FlaKernel:
    """A function of flash-linear-attention for whole sequences, one for single tokens, and what they call their arguments."""

    package: str
    chunk: str
    token: str
    decay: str = ""
    key: str = "k"
    """Which of our tensors is theirs: without erase they take the write key."""
    beta: str = "beta"
    scan: bool = False

    def function(self, name: str) -> Callable[..., Any]:
        """Imported at the first call: that takes seconds."""
        found: Callable[..., Any] = getattr(importlib.import_module(f"fla.ops.{self.package}"), name)
        return found

    def arguments(self, x: Inputs) -> dict[str, Tensor]:
        """By keyword."""
        key = x["k"] if self.key == "k" else x["beta"][..., None] * x["k"]
        found = {"q": x["q"], "k": key, "v": x["v"]}
        if self.decay:
            found[self.decay] = x["log_decay"]
        if self.beta:
            found[self.beta] = x["beta"]
        if self.scan:
            found |= {"g_atk": x["forget"], "beta_atk": x["gain"], "log_atk_scale": x["centre"]}
        return found


_FLA_KERNELS = {
    Rule("scalar"): FlaKernel("gated_delta_rule", "chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule", "g"),
    Rule("none"): FlaKernel("delta_rule", "chunk_delta_rule", "fused_recurrent_delta_rule"),
    Rule("channel"): FlaKernel("kda", "chunk_kda", "fused_recurrent_kda", "g"),
    Rule("scalar", erase=False): FlaKernel("simple_gla", "chunk_simple_gla", "fused_recurrent_simple_gla", "g", "w", ""),
    Rule("channel", erase=False): FlaKernel("gla", "chunk_gla", "", "g", "w", ""),
    Rule("scalar", preconditioner="diagonal"): FlaKernel(
        "precond_gated_delta_rule",
        "chunk_precond_gated_delta_rule",
        "fused_recurrent_precond_gated_delta_rule",
        "g",
        scan=True,
    ),
    Rule("channel", preconditioner="diagonal"): FlaKernel(
        "precond_kda", "chunk_precond_kda", "fused_recurrent_precond_kda", "g", scan=True
    ),
}


def fla_kernel(rule: Rule, device: torch.device) -> FlaKernel | None:
    """What computes the rule on `device`, if anything does."""
    return _FLA_KERNELS.get(rule) if device.type == "cuda" and _installed("fla") else None


def _fla(kernel: FlaKernel, x: Inputs) -> Tensor:
    o: Tensor = kernel.function(kernel.chunk)(**kernel.arguments(x))[0]
    return o
