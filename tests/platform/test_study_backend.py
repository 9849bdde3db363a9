"""A study may name every backend that the kernels know, whatever this machine has; a typo is answered with the nearest."""

from __future__ import annotations

import typing

import pytest

from deltalab.errors import UserError
from deltalab.kernels import backends, resolve_backend
from deltalab.platform.config import TrainingConfig
from deltalab.platform.config.schema import BACKENDS
from deltalab.strict import build


def test_the_schema_knows_the_kernels_backends() -> None:
    with pytest.raises(UserError) as raised:
        resolve_backend("?", "cpu")
    assert str(raised.value).endswith(f"Valid: {', '.join(BACKENDS)}")
    assert set(backends()) < set(BACKENDS)


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_can_be_named(name: str) -> None:
    assert build(TrainingConfig, {"backend": name}, "base.training").backend == name


@pytest.mark.parametrize(("typo", "meant"), [("tirton", "triton"), ("fal", "fla"), ("refrence", "reference"), ("Torch", "torch")])
def test_a_typo_names_the_nearest(typo: str, meant: str) -> None:
    with pytest.raises(UserError) as raised:
        build(TrainingConfig, {"backend": typo}, "base.training")
    assert str(raised.value).startswith(f"base.training.backend: unknown backend {typo!r}. Did you mean {meant!r}? Valid: auto, ")


def test_the_default_is_one() -> None:
    assert typing.get_type_hints(TrainingConfig)["backend"] is str and TrainingConfig().backend == "auto"
