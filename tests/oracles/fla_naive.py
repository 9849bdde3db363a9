"""The naive forms of flash-linear-attention: independent oracles that run on the CPU.

Each operator there has a file `fla/ops/<operator>/naive.py` that needs torch and einops alone. These files are run from where
the distribution `fla-core` lies, without importing the package `fla`: its import needs Triton, takes seconds, and fails where
the folder `kernels` of this repository is importable by that name (transformers looks for a package called so).

Call them by keyword: the order of beta and g differs between operators. All compute in float32.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from importlib.metadata import distribution
from types import ModuleType
from typing import Any

Naive = Callable[..., Any]

OPERATORS: dict[str, tuple[str, ...]] = {
    "delta_rule": ("delta_rule_recurrence",),
    "gated_delta_rule": ("naive_recurrent_gated_delta_rule", "naive_chunk_gated_delta_rule"),
    "kda": ("naive_recurrent_kda",),
    "comba": ("naive_recurrent_comba", "naive_chunk_comba"),
    "gated_delta_product": ("naive_recurrent_gated_delta_product",),
    "mesa_net": ("naive_mesa_net_exact",),
    "gdn2": ("naive_recurrent_gdn2", "naive_chunk_gdn2"),
    "precond_gated_delta_rule": ("naive_recurrent_precond_gated_delta_rule",),
    "precond_kda": ("naive_recurrent_precond_kda",),
    "simple_gla": ("naive_recurrent_simple_gla", "naive_chunk_simple_gla"),
    "gla": ("naive_recurrent_gla",),
    "retention": ("naive_retention",),
}
"""Operator -> its naive forms that take any length: the token by token one first, then the chunk form where there is one."""


def naive(operator: str, form: str | None = None) -> Naive:
    """A naive form of `operator`; without `form`, the token by token one."""
    function: Naive = getattr(_module(operator), form or OPERATORS[operator][0])
    return function


@cache
def _module(operator: str) -> ModuleType:
    file = distribution("fla-core").locate_file(f"fla/ops/{operator}/naive.py")
    spec = importlib.util.spec_from_file_location(f"fla_naive_{operator}", str(file))
    assert spec is not None and spec.loader is not None, f"fla-core has no {file}"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
