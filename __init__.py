"""deltalab: which component of a linear recurrence made the difference?

    from deltalab import registry                  # cards: named recurrences as choices of components
    from deltalab.kernels import delta_rule        # the one recurrence they all share
    from deltalab.recurrences import LanguageModel, Mixer

Names are imported on first use, so that `import deltalab` costs nothing. It also lets transformers' Auto classes know the models
that `deltalab export` writes.
"""

from __future__ import annotations

import importlib
from typing import Any

from . import auto_models

__version__ = "0.1.0"
__all__ = ["LanguageModel", "Mixer", "UserError", "__version__", "delta_rule", "registry", "results"]

_HOMES = {
    "Mixer": "deltalab.recurrences",
    "LanguageModel": "deltalab.recurrences",
    "UserError": "deltalab.errors",
    "delta_rule": "deltalab.kernels",
    "results": "deltalab.platform.analysis",
}


if __name__ == "deltalab":  # pytest also imports the checkout under its folder's name
    auto_models.make_known()


def __getattr__(name: str) -> Any:
    if name == "registry":
        return importlib.import_module("deltalab.registry")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'deltalab' has no attribute {name!r}")
