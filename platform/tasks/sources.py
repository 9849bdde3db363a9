"""What a corpus consists of, found without reading it: the standard library of this Python, one file, a folder, or a name on the
Hugging Face Hub (`hub`).

A folder is walked recursively in the order of its names. Left out: hidden files and folders (a leading dot), `__pycache__`,
folders marked as caches by a file CACHEDIR.TAG (our own, should the data root lie inside), what is not a regular file, and files
that look binary (a zero byte among the first 8192, as git decides it). `*.jsonl`, `*.ndjson` and `*.parquet` are rows, anything
else is one text. A file named directly is read whatever it looks like.
"""

from __future__ import annotations

import os
import platform
import stat
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...errors import UserError, nearest
from .hub import PREFIX, HubName, looks_like_hub_name, parse_hub_name
from .store import CACHE_TAG, content_digest

STDLIB = "python-stdlib"
_ROWS = {".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}
# Not part of the corpus: installed packages, and what distributions ship apart or generate per machine.
_NOT_CORPUS = frozenset(
    (
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "idle_test",
        "lib2to3",
        "tkinter",
        "turtledemo",
        "ensurepip",
        "distutils",
    )
)


@dataclass(frozen=True)
class Source:
    """One file: `kind` is "text", or the builder of `datasets` that reads its rows ("json", "parquet")."""

    path: Path
    label: str
    """The path below the corpus, with slashes."""
    kind: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class HubSplit:
    """One split of a dataset on the Hub; `config` is empty where the dataset has only one."""

    name: HubName
    config: str
    split: str

    def __str__(self) -> str:
        return f"{self.name} {self.config + ' ' if self.config else ''}{self.split}"


@dataclass(frozen=True)
class Listing:
    """The files of a corpus, and how many were left out because they look binary; or the split of the Hub that it is."""

    corpus: str
    root: str
    sources: tuple[Source, ...]
    binary: int = 0
    hub: HubSplit | None = None

    @property
    def size(self) -> int:
        """Bytes of all files; 0 for a split of the Hub."""
        return sum(source.size for source in self.sources)

    @property
    def description(self) -> str:
        """What the record of a run says it was trained on."""
        return f"{STDLIB} {platform.python_version()}" if self.corpus == STDLIB else printable(self.root)

    def fingerprint(self) -> str:
        """32 hexadecimal digits of the place and of every file's name, size and time of modification."""
        files = [[source.label, source.kind, source.size, source.mtime_ns] for source in self.sources]
        return content_digest({"root": self.root, "files": files})


def printable(path: str) -> str:
    """A path in plain UTF-8: a name that is not valid UTF-8 shows its odd bytes as escapes."""
    return path.encode("utf-8", "backslashreplace").decode("utf-8")


def list_hub(corpus: str, config: str, split: str, where: str) -> Listing:
    """A split of a dataset on the Hub, which is not asked yet. `UserError` (starting with `where`) for a malformed name."""
    hub = HubSplit(parse_hub_name(corpus, where), config, split)
    return Listing(corpus, str(hub), (), hub=hub)


def list_sources(corpus: str, where: str) -> Listing:
    """The files of `python-stdlib`, of a file or of a folder. `UserError` (starting with `where`) if there is nothing to read."""
    if corpus == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        sources = tuple(_walk(root, where, _NOT_CORPUS, only=".py"))
        if not sources:
            raise UserError(
                f"{where}: this Python has no sources of its library at {str(root)!r}; give a text file or a folder instead"
            )
        return Listing(corpus, str(root), sources)
    root = _existing(corpus, where)
    if root.is_file():
        return Listing(corpus, str(root), (_source(root, root.name, where),))
    found = list(_walk(root, where))
    sources = tuple(source for source in found if not _looks_binary(source, where))
    if not sources:
        why = f"its {len(found)} files look binary" if found else "it holds no visible regular file"
        raise UserError(
            f"{where}: the folder {corpus!r} has no text to read: {why}. Text, .jsonl, .ndjson and .parquet files are read"
        )
    return Listing(corpus, str(root), sources, binary=len(found) - len(sources))


def _existing(corpus: str, where: str) -> Path:
    if not corpus.strip():
        raise UserError(f"{where}: {corpus!r} is no path. Give {STDLIB!r}, a file or a folder")
    try:
        path = Path(corpus).expanduser()
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(_missing(Path(corpus).expanduser(), corpus, where)) from None
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a forbidden folder, a zero byte, an unknown ~user
        raise UserError(f"{where}: {corpus!r} cannot be read: {reason(error)}") from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"{where}: {corpus!r} is neither a file nor a folder")
    return path.resolve()


def _missing(path: Path, corpus: str, where: str) -> str:
    message = f"{where}: {corpus!r} does not exist."
    parent = path.parent
    if parent.is_dir():
        try:
            siblings = sorted(os.listdir(parent))
        except OSError:
            siblings = []
        close = nearest(path.name, [STDLIB, *siblings])
        if close:
            return f"{message} Did you mean {close if close == STDLIB else str(parent / close)!r}?"
        return f"{message} Give {STDLIB!r}, a file or a folder; relative paths start at {str(Path.cwd())!r}"
    if looks_like_hub_name(corpus):
        message += f" A dataset on the Hugging Face Hub is written {PREFIX + corpus!r}."
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    return f"{message} The nearest folder that does is {str(parent)!r}; relative paths start at {str(Path.cwd())!r}"


def _walk(root: Path, where: str, leave_out: frozenset[str] = frozenset(), only: str = "") -> Iterator[Source]:
    """Regular files below `root` in the order of their names; links to folders are not followed (they may form circles)."""

    def fail(error: OSError) -> None:
        raise UserError(f"{where}: the folder {str(error.filename)!r} cannot be read: {reason(error)}") from None

    for folder, subfolders, names in os.walk(root, onerror=fail):
        subfolders[:] = sorted(
            name
            for name in subfolders
            if not _ignored(name) and name not in leave_out and not Path(folder, name, CACHE_TAG).exists()
        )
        for name in sorted(names):
            path = Path(folder, name)
            generated = only and name.startswith("_sysconfigdata")  # this machine's compiler flags and folders
            if _ignored(name) or generated or not name.endswith(only) or (path.exists() and not path.is_file()):
                continue
            yield _source(path, path.relative_to(root).as_posix(), where)


def _ignored(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def _source(path: Path, label: str, where: str) -> Source:
    try:
        status = path.stat()
    except OSError as error:  # a broken link
        raise UserError(f"{where}: the file {str(path)!r} cannot be read: {reason(error)}") from None
    return Source(path, label, _ROWS.get(path.suffix.lower(), "text"), status.st_size, status.st_mtime_ns)


def _looks_binary(source: Source, where: str) -> bool:
    if source.kind != "text":
        return False
    try:
        with open(source.path, "rb") as file:
            return b"\0" in file.read(8192)
    except OSError as error:
        raise UserError(f"{where}: the file {str(source.path)!r} cannot be read: {reason(error)}") from None


def reason(error: BaseException) -> str:
    """What went wrong, in one line, without repeating the path."""
    return (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split()) or type(error).__name__
