"""What the tests of `lm` share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deltalab.errors import UserError
from deltalab.platform.tasks import IGNORE, PreparedTask, build_task, prepare_task

SPLITS = ("train", "validation", "test")


def prepare(cache: Path, corpus: Path | str, length: int = 4, **more: object) -> PreparedTask:
    return prepare_task(build_task({"name": "lm", "corpus": str(corpus), "length": length, **more}), cache)


def refusal(cache: Path, corpus: Path | str, length: int = 4, **more: object) -> str:
    with pytest.raises(UserError) as error:
        prepare(cache, corpus, length, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


def split_bytes(cache: Path) -> dict[str, bytes]:
    (folder,) = cache.glob("lm-*")
    return {split: np.load(folder / f"{split}.text.npy").tobytes() for split in SPLITS}


def scored(data: PreparedTask) -> int:
    return sum(int((split.rows(np.arange(len(split)))[1] != IGNORE).sum()) for split in (data.train, data.validation, data.test))


def jsonl(path: Path, texts: list[str | None], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: text, "number": 1}) + "\n" for text in texts), encoding="utf-8")
    return path


def parquet(path: Path, texts: list[str | None], column: str = "text") -> Path:
    pq.write_table(pa.table({column: texts, "number": list(range(len(texts)))}), path)
    return path


DOCUMENTS = [f"document {i}: " + "naïve → \r\n\t" * (1 + i % 5) for i in range(60)]
WEIRD = bytes(range(256)) * 3 + b"\r\n\r\n\xff\xfe\x00\x00\xc3\x28\xed\xa0\x80" + b"\x00" * 50
