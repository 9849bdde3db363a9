"""Every check of `checks`, on every card, component and task that was asked for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from deltalab.tests.conformance.checks import CheckError, Subject, TaskSubject, run_check


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_conformance(conformance_case: tuple[str, Subject | TaskSubject]) -> None:
    name, subject = conformance_case
    try:
        run_check(name, subject)
    except CheckError as error:
        pytest.fail(f"{subject.label}: {name}: {error}", pytrace=False)
