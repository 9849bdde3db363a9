"""What one test may leave behind in its process, put back for the next."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _denormals_as_they_were() -> Iterator[None]:
    """A trial flushes denormals to zero (`prepare_device`); in a process that stays, hypothesis' floats would be wrong."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)
