"""Floor 2: one YAML card per named recurrence.

registry.names()                                   # ['comba', 'deltanet', 'gdn', ...]
registry.load("gdn")                               # a RecurrenceSpec
registry.load({"card": "gdn", "gate": "channel"})  # the card with one axis turned
registry.load("my_card.yaml")                      # a card of your own
registry.load("gdn gdn gdn softmax")               # a HybridSpec: a pattern of layers
registry.add_folder("cards")                       # your cards, by name
registry.presets.load("pdn-1b")                    # a Preset: the rest of a published language model
registry.add_import("my_gates")                    # a module that registers components, or tasks, of your own
"""

from .. import plugins as _plugins
from . import presets
from .compare import Difference, differences
from .loader import load, read_card
from .origins import check_origins, origins
from .sources import add_folder, names


def add_import(module: str, where: str = "import") -> None:
    """Use what a module (its name, or its Python file) registers, in this process. `UserError` where it cannot be imported."""
    _plugins.add([module], where)


__all__ = [
    "Difference",
    "add_folder",
    "add_import",
    "check_origins",
    "differences",
    "load",
    "names",
    "origins",
    "presets",
    "read_card",
]
