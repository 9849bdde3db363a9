"""The documents of the task `recall_text` as lm-eval asks them: read once or twice, answered by generation."""

from __future__ import annotations

import re
from typing import Any

from deltalab.platform.tasks.recall_text import RecallTextConfig, documents, prompt
from deltalab.strict import build, fields_of


def load(**metadata: Any) -> dict[str, Any]:
    """The test split: `documents` of them, by the task's own settings (`length`, `facts`, `data_seed`, ...)."""
    import datasets

    settings = {key: value for key, value in metadata.items() if key in fields_of(RecallTextConfig)}
    config = build(RecallTextConfig, settings, "metadata")
    return {"test": datasets.Dataset.from_list([dict(one) for one in documents(config, "test", int(metadata["documents"]))])}


def read_once(document: dict[str, Any]) -> str:
    """The document, then the question."""
    return prompt(document, "once")


def read_twice(document: dict[str, Any]) -> str:
    """Both, and both again."""
    return prompt(document, "twice")


def contains(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 where the answer stands in what was generated, whatever its case."""
    return {"contains": float(re.search(re.escape(document["answer"]), results[0], re.IGNORECASE) is not None)}
