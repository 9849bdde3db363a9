"""Measuring: kernels beside their peers, and every backend against the definition (`deltalab bench`, `deltalab verify`)."""

from ..training.verification import Verdict, verify
from .kernels import Row, bench_kernels
from .rules import Case

__all__ = ["Case", "Row", "Verdict", "bench_kernels", "verify"]
