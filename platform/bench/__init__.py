"""Measuring ourselves beside peers: kernels on fresh inputs, interleaved, with the error next to the time."""

from .kernels import Case, Row, bench_kernels
from .verification import Verdict, verify

__all__ = ["Case", "Row", "Verdict", "bench_kernels", "verify"]
