"""Measuring ourselves beside peers: kernels on fresh inputs, interleaved, with the error next to the time."""

from ..training.verification import Verdict, verify
from .kernels import Case, Row, bench_kernels

__all__ = ["Case", "Row", "Verdict", "bench_kernels", "verify"]
