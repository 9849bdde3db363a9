"""Floor 2: one YAML card per named recurrence.

registry.names()                                   # ['deltanet', 'gdn', ...]
registry.load("gdn")                               # a RecurrenceSpec
registry.load({"card": "gdn", "gate": "channel"})  # the card with one axis turned
registry.load("my_card.yaml")                      # a card of your own
"""

from .loader import load, names, read_card

__all__ = ["load", "names", "read_card"]
