"""A small trained-size model and small data for what is measured of them."""

from __future__ import annotations

import pytest

from deltalab import registry
from deltalab.platform.tasks import PreparedTask, build_task, prepare_task
from deltalab.platform.training import Hardware, prepare_device
from deltalab.recurrences import LanguageModel

MQAR = {
    "name": "mqar",
    "vocab": 32,
    "length": 16,
    "pairs": 2,
    "train_examples": 200,
    "validation_examples": 40,
    "test_examples": 50,
    "lengths": [1, 2, 4],
    "probes": [{"pairs": 4}],
}


@pytest.fixture(scope="session")
def hardware() -> Hardware:
    return prepare_device(1, "fp32", 16)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedTask:
    return prepare_task(build_task(MQAR), tmp_path_factory.mktemp("cache"))


@pytest.fixture
def model(request: pytest.FixtureRequest) -> LanguageModel:
    """A model of the card that the test is parametrised with, or of gdn."""
    card = getattr(request, "param", "gdn")
    return LanguageModel(registry.load(card), vocab=32, width=16, layers=2, heads=1, seed=0).eval()
