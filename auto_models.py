"""transformers' Auto classes know the models that `deltalab export` writes, without remote code.

    import deltalab
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("exported")

`import deltalab` imports neither torch nor transformers. It watches for the two modules of transformers that hold the tables of
known models, and adds to each table when it has been loaded.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_CONFIGURATIONS = "transformers.models.auto.configuration_auto"
_MODELS = "transformers.models.auto.modeling_auto"


def make_known() -> None:
    """Let transformers' Auto classes know `model_type: deltalab`: at once where they are loaded, else when they are."""
    for name in (_CONFIGURATIONS, _MODELS):
        if name in sys.modules:
            _add(sys.modules[name])
        elif not any(isinstance(finder, _Watch) and finder.name == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _Watch(name))


def _add(module: ModuleType) -> None:
    """Add to the table that this module holds."""
    from .recurrences.hugging_face.configuration import MODEL_TYPE, DeltalabConfig

    if module.__name__ == _CONFIGURATIONS:
        module.AutoConfig.register(MODEL_TYPE, DeltalabConfig, exist_ok=True)
    else:
        from .recurrences.hugging_face.modeling import DeltalabForCausalLM

        module.AutoModelForCausalLM.register(DeltalabConfig, DeltalabForCausalLM, exist_ok=True)


class _Watch(importlib.abc.MetaPathFinder):
    """Finds one module as everyone else would, and adds to it once it has been loaded."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Another loader, with `_add` after it."""

    def __init__(self, own: Any) -> None:
        self.own = own

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.own.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        self.own.exec_module(module)
        _add(module)
