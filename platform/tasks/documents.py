"""The documents inside one file or one split of the Hub, as bytes.

A text file is one document and its bytes are taken as they are: Hugging Face `datasets` has a text reader, but it decodes and
translates line ends, so the bytes would not be the file's. Rows of JSONL and Parquet files are read through `datasets` (streamed:
no copy of the data is written), a row's text column being one document, encoded as UTF-8; so are datasets on the Hub.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import UserError, nearest
from .hub import HubError, offline, resolve
from .sources import HubSplit, Source, reason

_CHUNK = 1 << 24
_WHOLE = 1 << 26  # bytes of a JSONL file that are parsed in one piece

Document = Iterable[bytes]
"""The pieces of one document, to be read before the next document is asked for."""


def read_documents(source: Source, column: str, path: str) -> Generator[Document, None, None]:
    """The documents of a file in order. `UserError` naming `path`.corpus (or `path`.column) and the file if it cannot be read."""
    if source.kind == "text":
        yield _pieces(source, path)
        return
    if source.size == 0:
        return
    try:
        for row in _rows(source):
            yield (_text(row, column, str(source.path), path),)
    except UserError:
        raise
    except Exception as error:  # pyarrow, pandas and datasets each raise their own kinds
        fault = _fault(source, error)
        if fault is None:
            return
        raise UserError(f"{path}.corpus: the file {str(source.path)!r} cannot be read: {fault}") from error


class HubDocuments:
    """The documents of a split of the Hub, in its order, as they arrive; `commit` is known once the Hub was asked."""

    def __init__(self, hub: HubSplit, column: str, path: str) -> None:
        self._hub, self._column, self._path = hub, column, path
        self.commit = ""

    def __iter__(self) -> Generator[Document, None, None]:
        """`UserError` naming `path`.corpus, .hub_config, .hub_split or .column if it cannot be read."""
        import datasets

        hub, path = self._hub, self._path
        try:
            self.commit = "" if offline() else resolve(hub.name, "dataset")
            rows = datasets.load_dataset(
                hub.name.repo, hub.config or None, split=hub.split, revision=self.commit or hub.name.revision, streaming=True
            )
            for row in rows:
                yield (_text(row, self._column, str(hub), path),)
        except UserError:
            raise
        except Exception as error:  # each reader and the HTTP client raise their own kinds
            words = str(error) if isinstance(error, HubError) else _before_code(error)
            if offline() and isinstance(error, ConnectionError):
                words = "HF_HUB_OFFLINE is set, and it is not in the cache of `datasets`"
            field = "corpus"
            if isinstance(error, ValueError) and "config" in words.lower():
                field = "hub_config"
            elif isinstance(error, ValueError) and "split" in words.lower():
                field = "hub_split"
            raise UserError(f"{path}.{field}: {str(hub)!r} cannot be read: {words}") from error


@contextmanager
def quiet_datasets(network: bool = False) -> Iterator[None]:
    """Within it, `datasets` neither logs nor draws, and without `network` does not report to its makers which reader is used."""
    import datasets

    offline, level = datasets.config.HF_HUB_OFFLINE, datasets.logging.get_verbosity()
    bars = datasets.are_progress_bars_disabled()
    datasets.config.HF_HUB_OFFLINE = offline or not network
    datasets.logging.set_verbosity(logging.CRITICAL + 1)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def _pieces(source: Source, path: str) -> Iterator[bytes]:
    try:
        with open(source.path, "rb") as file:
            while piece := file.read(_CHUNK):
                yield piece
    except OSError as error:
        raise UserError(f"{path}.corpus: the file {str(source.path)!r} cannot be read: {reason(error)}") from None


def _rows(source: Source) -> Iterator[Mapping[str, Any]]:
    """The rows through `datasets`, under a plain name: it would take `[`, `*` and `::` in a path for patterns and chains."""
    import datasets

    with tempfile.TemporaryDirectory(prefix="deltalab-") as folder:
        link = Path(folder, f"rows.{source.kind}")
        os.symlink(source.path.absolute(), link)
        yield from datasets.load_dataset(
            source.kind, data_files={"train": [str(link)]}, split="train", streaming=True, **_options(source)
        )


def _options(source: Source) -> dict[str, Any]:
    """What the readers of `datasets` must be told so that any sound file is read as it stands."""
    if source.kind == "parquet":
        return {"batch_size": 1024}  # the default, the size of the first row group, fails where that is empty
    from datasets.packaged_modules.json.json import JsonConfig

    # The columns are those of the first piece, and one that appears later is an error: make the first piece the whole file.
    options: dict[str, Any] = {"chunksize": min(source.size, _WHOLE)}
    if "parse_agent_traces" in JsonConfig.__dataclass_fields__:
        options["parse_agent_traces"] = False  # rows that look like an assistant's log would be rewritten
    return options


def _text(row: Mapping[str, Any], column: str, where: str, path: str) -> bytes:
    if column not in row:
        close = nearest(column, row)
        meant = f" Did you mean {close!r}?" if close else ""
        columns = ", ".join(map(str, row))
        raise UserError(f"{path}.column: {column!r} is not a column of {where!r}.{meant} Columns: {columns}")
    value = row[column]
    if value is None:
        return b""
    if not isinstance(value, str):
        raise UserError(f"{path}.column: {column!r} of {where!r} is not text: it holds {value!r:.60} ({type(value).__name__})")
    return value.encode("utf-8", "surrogatepass")


def _before_code(error: Exception) -> str:
    """A message in one line, without the example of code that `datasets` ends it with."""
    return " ".join(str(error).partition("Example of usage")[0].split()) or type(error).__name__


def _fault(source: Source, error: Exception) -> str | None:
    """What is wrong with a file whose reading failed with `error`: the line of a JSONL file and why. None: it is blank."""
    if isinstance(error, OSError):
        return reason(error)
    if source.kind == "parquet":
        return f"not a readable Parquet file ({reason(error)})"
    blank = True
    with open(source.path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            blank = False
            try:
                value = json.loads(line)
                json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text
            except json.JSONDecodeError as wrong:
                return f"line {number} is not valid JSON: {wrong.msg} (column {wrong.colno})"
            except ValueError as wrong:
                return f"line {number} is not valid JSON: {reason(wrong)}"
            if not isinstance(value, dict):
                return f"line {number} is not a JSON object but {json.dumps(value):.60}"
    if blank:
        return None
    if "column names don't match" in str(error):
        return f"a column appears only after its first {_WHOLE >> 20} MiB; keep the text's column alone, or split the file"
    return reason(error)
