"""Arrays a task prepared once, kept on disk and memory-mapped by every trial after.

Layout, under the cache folder that `prepare` is given:

    CACHEDIR.TAG                   says that all of this may be deleted
    <task>-<fingerprint>/          complete, or not there: written elsewhere, then renamed
        manifest.json              {"sha256": of the rest, "manifest": {"layout", "digest", "facts", "arrays": {name:
                                   {"dtype", "shape", "sha256" of the values, "size" and "mtime_ns" of the file}}}}
        <array>.npy                one array each, C order
    .<task>-<fingerprint>.lock     held by whoever builds; the others wait, then read
    .<task>-<fingerprint>.*.tmp/   a build under way; left by a killed process, it is removed by the next build

A folder is believed when its manifest is whole and every file has the recorded size, shape and type; where a file's modification
time is not the recorded one (copied, restored, written into), its values are hashed again. What fails this is built anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ...errors import UserError
from .base import Progress

if TYPE_CHECKING:
    from filelock import BaseFileLock

CACHE_TAG = "CACHEDIR.TAG"
"""Marks the cache folder for backup programs, and for corpora that have it inside (bford.info/cachedir)."""

_TAG_TEXT = "Signature: 8a477f597d28d172789f06886806bc55\n# The data deltalab's tasks prepared. Safe to delete.\n"
_LAYOUT = 1
_BLOCK = 1 << 24
_PATIENCE = 1.0  # seconds between two words about waiting

Array = NDArray[Any]


@dataclass(frozen=True)
class Stored:
    """One complete folder: its arrays (read-only memory maps), the facts the builder returned, the digest of all values."""

    digest: str
    facts: Mapping[str, Any]
    arrays: Mapping[str, Array]


class ArrayFile:
    """A .npy file written front to back. A full disk is an `OSError` here; through a memory map it would kill the process."""

    def __init__(self, file: IO[bytes], dtype: DTypeLike, shape: tuple[int, ...]) -> None:
        self.dtype = np.dtype(dtype)
        self.shape = shape
        self._file = file
        self._hash = hashlib.sha256()
        self._left = int(np.prod(shape, dtype=np.int64))
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)

    def append(self, values: Array) -> None:
        """The next values, any shape; they must be exactly representable in the file's type."""
        block = np.ascontiguousarray(values, dtype=self.dtype)
        self._left -= block.size
        self._hash.update(block.data)
        self._file.write(block.data)

    def close(self) -> dict[str, Any]:
        """Everything on disk; the manifest's entry. The shape promised must have been filled."""
        assert self._left == 0, f"{self._left} values missing"
        self._file.flush()
        os.fsync(self._file.fileno())
        status = os.fstat(self._file.fileno())
        return {
            "dtype": self.dtype.str,
            "shape": list(self.shape),
            "sha256": self._hash.hexdigest(),
            "size": status.st_size,
            "mtime_ns": status.st_mtime_ns,
        }


class Writer:
    """What a builder writes to: `create` an array, append its values; `scratch` is a folder that vanishes after the build."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.scratch = folder / "scratch"
        self.scratch.mkdir()
        self._folder = folder
        self._stack = stack
        self.files: dict[str, ArrayFile] = {}

    def create(self, name: str, dtype: DTypeLike, shape: tuple[int, ...]) -> ArrayFile:
        """A new array `name` of that type and shape, to be filled by `append`."""
        file = self._stack.enter_context((self._folder / f"{name}.npy").open("wb"))
        self.files[name] = ArrayFile(file, dtype, shape)
        return self.files[name]


Builder = Callable[[Writer], dict[str, Any]]
"""Fills the arrays and returns facts: plain JSON values worth keeping with them."""


def obtain(cache: Path, key: str, build: Builder, progress: Progress | None = None) -> Stored:
    """The arrays under `cache`/`key`: memory-mapped if they are there and whole, else built once, however many processes ask.

    `progress` is told while another process builds them. `UserError` if the folder cannot be written.
    """
    from filelock import FileLock

    folder = cache / key
    stored = _load(folder)
    if stored is not None:
        return stored
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if not (cache / CACHE_TAG).exists():
            (cache / CACHE_TAG).write_text(_TAG_TEXT, encoding="ascii")
        with _locked(FileLock(cache / f".{key}.lock"), progress):
            stored = _load(folder)
            if stored is None:
                _build(folder, build)
                stored = _load(folder)
    except OSError as error:
        raise UserError(f"the task cache {str(folder)!r} cannot be written: {error.strerror or error}") from error
    assert stored is not None, f"{folder} is not readable right after it was written"
    return stored


def content_digest(parts: Mapping[str, Any]) -> str:
    """32 hexadecimal digits of a JSON value, the same for the same value in any order of keys."""
    return hashlib.sha256(_canonical(parts)).hexdigest()[:32]


@contextmanager
def _locked(lock: BaseFileLock, progress: Progress | None) -> Iterator[None]:
    """Hold the lock; while another process has it, `progress` hears why nothing else happens."""
    from filelock import Timeout

    stage, waited = "waiting for a process that prepares the same data", False
    while True:
        try:
            lock.acquire(timeout=_PATIENCE)
            break
        except Timeout:
            waited = True
            if progress is not None:
                progress(stage, 0, 0)
    if waited and progress is not None:
        progress(stage, 1, 1)
    try:
        yield
    finally:
        lock.release()


def _build(folder: Path, build: Builder) -> None:
    for stale in folder.parent.glob(f".{folder.name}.*.tmp"):  # we hold the lock: nobody is writing these
        shutil.rmtree(stale, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        temporary.chmod(0o755)  # mkdtemp's 0700 would hide a shared cache from colleagues
        with ExitStack() as stack:
            writer = Writer(temporary, stack)
            facts = build(writer)
            arrays = {name: file.close() for name, file in writer.files.items()}
        shutil.rmtree(writer.scratch)
        values = {name: [entry["dtype"], entry["shape"], entry["sha256"]] for name, entry in arrays.items()}
        manifest = {"layout": _LAYOUT, "digest": content_digest(values), "facts": facts, "arrays": arrays}
        _write_manifest(temporary, manifest)
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
        elif folder.exists() or folder.is_symlink():
            folder.unlink()
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _load(folder: Path) -> Stored | None:
    """The folder's arrays, or None if it is missing or damaged."""
    try:
        document = json.loads((folder / "manifest.json").read_bytes())
        manifest = document["manifest"]
        if document["sha256"] != hashlib.sha256(_canonical(manifest)).hexdigest() or manifest["layout"] != _LAYOUT:
            return None
        arrays = {name: _map(folder / f"{name}.npy", entry) for name, entry in manifest["arrays"].items()}
        moved = _moved(folder, manifest, arrays)
    except (OSError, ValueError, KeyError, TypeError):  # whatever stands there is not a whole folder
        return None
    if moved is None:
        return None
    if moved:
        with suppress(OSError):  # a cache one may only read: its values are hashed again next time
            _write_manifest(folder, manifest)
    return Stored(manifest["digest"], manifest["facts"], arrays)


def _map(file: Path, entry: Mapping[str, Any]) -> Array:
    shape = tuple(entry["shape"])
    if file.stat().st_size != entry["size"]:
        raise ValueError("wrong size")
    empty = 0 in shape  # nothing to map
    array: Array = np.load(file, mmap_mode=None if empty else "r", allow_pickle=False)
    if array.shape != shape or array.dtype.str != entry["dtype"]:
        raise ValueError("wrong header")
    return array


def _moved(folder: Path, manifest: Mapping[str, Any], arrays: Mapping[str, Array]) -> bool | None:
    """Whether a file's time changed though its values did not (the manifest is updated); None if values changed."""
    changed = False
    for name, entry in manifest["arrays"].items():
        mtime_ns = (folder / f"{name}.npy").stat().st_mtime_ns
        if mtime_ns != entry["mtime_ns"]:
            if _hash(arrays[name]) != entry["sha256"]:
                return None
            entry["mtime_ns"] = mtime_ns
            changed = True
    return changed


def _hash(array: Array) -> str:
    digest = hashlib.sha256()
    flat = array.reshape(-1)
    step = max(1, _BLOCK // array.itemsize)
    for start in range(0, flat.size, step):
        digest.update(np.ascontiguousarray(flat[start : start + step]).data)
    return digest.hexdigest()


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    document = {"sha256": hashlib.sha256(_canonical(manifest)).hexdigest(), "manifest": manifest}
    handle, name = tempfile.mkstemp(prefix="manifest.", suffix=".tmp", dir=folder)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, folder / "manifest.json")
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")
