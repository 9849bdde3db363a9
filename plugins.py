"""Components and tasks of other packages, imported before one is looked up by name.

They come from the entry point groups `deltalab.components` and `deltalab.tasks` (their values modules that register on import),
from $DELTALAB_IMPORT (modules, separated by commas) and from `--import MODULE` (`add`). A module may be installed, lie on the
Python path or in the current folder, or be given as a file (`my_gates.py`). Entry points and variable wait until the first name
is looked up. What a module registers is its own affair: nothing here knows components or tasks.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

from .errors import UserError, shown

GROUPS, VARIABLE = ("deltalab.components", "deltalab.tasks"), "DELTALAB_IMPORT"
Import = tuple[str, str]
"""(module, the folder that Python finds it in): what another process needs to import it as well."""


class _State:
    """What this process was asked to import and what came of it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.busy = False
        self.installed = False
        self.imported: dict[str, Import] = {}
        self.problems: dict[str, str] = {}


_state = _State()


def add(modules: Iterable[str], where: str = "import") -> None:
    """Import these modules now (each may be a list separated by commas). One that cannot be is a `UserError`, and forgotten."""
    for name in _split(modules):
        with _state.lock, _noting(name, f"{where}: cannot import {shown(name)}"):
            if name not in _state.imported:
                _state.imported[name] = _import(name)
        problem = _state.problems.pop(name, None)
        if problem:
            raise UserError(problem)


def load() -> None:
    """Import every plug-in that is not imported yet. `UserError` where one cannot be: whose it is, and why."""
    problems = attempt()
    if problems:
        raise UserError(problems[0])


def attempt() -> list[str]:
    """The same without raising: what is wrong with the plug-ins that cannot be imported."""
    with _state.lock:
        # A plug-in that looks up components while it is imported sees those that there are.
        if not _state.busy:
            _state.busy = True
            try:
                _import_all()
            finally:
                _state.busy = False
        return list(_state.problems.values())


def imports() -> list[Import]:
    """What was imported on request, for a worker to `adopt`. Entry points are left out: the worker's installation has them."""
    load()
    return list(_state.imported.values())


def adopt(given: Sequence[Sequence[str]]) -> None:
    """Import what another process has imported (`imports()`), from where it was found there."""
    with _state.lock:
        for module, folder in given:
            if module not in sys.modules:
                _import_module(module, folder)
            _state.imported.setdefault(module, (module, folder))
    load()


def origin(module: str) -> str:
    """Where the code of a module comes from: `deltalab`, or package, version and a digest of the file: `my-gates 1.0 (3f2a9c1b)`.

    The digest makes edited code another one: results of both are never taken for the same.
    """
    top = module.split(".")[0]
    if top == "deltalab":
        return top
    known = _distribution(top)
    name, version = known or (top, str(getattr(sys.modules.get(top), "__version__", "")))
    return " ".join(word for word in (name, version, _digest(module)) if word)


def check_same(here: Mapping[str, str], planned: Mapping[str, str]) -> None:
    """`UserError` where this process has other code than the one that planned a trial. Both: what is foreign -> its origin."""
    for what in sorted({*here, *planned}):
        if here.get(what) != planned.get(what):
            raise UserError(
                f"{what}: planned with {planned.get(what, 'deltalab')}, but this worker has {here.get(what, 'deltalab')}; "
                "install the same plug-in wherever trials run"
            )


def _import_all() -> None:
    if not _state.installed:
        _state.installed = True
        points = {point for group in GROUPS for point in metadata.entry_points(group=group)}
        for point in sorted(points, key=lambda point: (point.group, point.name, point.value)):
            package = f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown package"
            with _noting(point.value, f"entry point {point.group} {point.name!r} of {package}: cannot import {point.value!r}"):
                point.load()
    for name in _split([os.environ.get(VARIABLE, "")]):
        if name not in _state.imported and name not in _state.problems:
            with _noting(name, f"${VARIABLE}: cannot import {shown(name)}"):
                _state.imported[name] = _import(name)


@contextmanager
def _noting(key: str, words: str) -> Iterator[None]:
    """A failure becomes a problem that names its cause and, for an error inside the module, the line."""
    try:
        yield
    except UserError as error:
        _state.problems[key] = f"{words}: {error}"
    except (Exception, SystemExit) as error:
        _state.problems[key] = f"{words}: {type(error).__name__}: {error}{_line(error)}"


def _line(error: BaseException) -> str:
    """` (gates.py, line 3)`: the innermost line of the plug-in's own code, where there is one."""
    place, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if file != __file__ and not file.startswith("<frozen") and Path(file).parent.name != "importlib":
            place = f" ({file}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return place


def _import(name: str) -> Import:
    """Import a module by name or file, looking in the current folder as well."""
    folder = ""
    if name.endswith(".py"):
        file = Path(name).expanduser().absolute()
        if not file.is_file():
            raise UserError("there is no such file")
        name, folder = file.stem, str(file.parent)
    elif not all(part.isidentifier() for part in name.split(".")):
        raise UserError("that is no module's name (my_package.my_gates) and no Python file (my_gates.py)")
    elif _lies_in(name.split(".")[0], os.getcwd()):
        folder = os.getcwd()
    held = sys.modules.get(name)
    if folder and held is not None and not _is_from(held, folder):
        raise UserError(f"a module {name!r} is loaded already, from {getattr(held, '__file__', None)}; rename yours")
    _import_module(name, folder)
    return name, folder or _home(name.split(".")[0])


def _import_module(name: str, folder: str) -> None:
    """Import with `folder` first on the path; afterwards it is the last, where it can shadow nothing."""
    if folder:
        sys.path.insert(0, folder)
    try:
        importlib.import_module(name)
    finally:
        if folder:
            sys.path.remove(folder)
            if folder not in sys.path:
                sys.path.append(folder)


def _lies_in(top: str, folder: str) -> bool:
    found = PathFinder.find_spec(top, [folder])
    return found is not None and found.origin is not None


def _is_from(module: object, folder: str) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve().is_relative_to(Path(folder).resolve())


def _home(top: str) -> str:
    """The folder of the Python path in which a top-level module lies; empty where it has no file."""
    module = sys.modules[top]
    paths = [*getattr(module, "__path__", [])] or [getattr(module, "__file__", None)]
    return os.path.dirname(os.path.abspath(paths[0])) if paths[0] else ""


def _split(texts: Iterable[str]) -> list[str]:
    return [name.strip() for text in texts for name in text.split(",") if name.strip()]


@functools.lru_cache(maxsize=64)
def _distribution(top: str) -> tuple[str, str] | None:
    """Name and version of the installed package that has a top-level module."""
    names = metadata.packages_distributions().get(top)
    return (names[0], metadata.version(names[0])) if names else None


@functools.lru_cache(maxsize=256)
def _digest(module: str) -> str:
    """`(3f2a9c1b)` from the module's source; empty where it has none."""
    try:
        source = inspect.getsource(sys.modules[module])
    except (OSError, TypeError, KeyError):
        return ""
    return f"({hashlib.sha256(source.encode()).hexdigest()[:8]})"
