"""One task in several settings: mixtures and curricula to train on, further settings to be measured in.

    task:
      name: mqar
      pairs: 8
      stages: [{pairs: 2}, {pairs: 4}, {pairs: 8}]    # train on these settings instead of on the one above
      order: staged                                   # one after the other, equal steps each; `mixed`: in every epoch all of them
      lengths: [1, 2, 4, 8, 16]                       # also measure on examples that many times as long ...
      probes: [{pairs: 16}, {pairs: 32}]              # ... and in these settings

Every task has these keys. Validation and test are those of the task's own setting: they select and report.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import UserError, shown, unknown
from ...strict import item, join

KEYS = ("stages", "order", "lengths", "probes")
"""Reserved: no task's own setting has these names."""
ORDERS = ("mixed", "staged")
LONGEST = 1024

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Composition:
    """What is trained and measured beside a task's own setting; empty: nothing."""

    stages: tuple[Settings, ...] = ()
    order: str = "mixed"
    lengths: tuple[int, ...] = ()
    probes: tuple[Settings, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.stages or self.lengths or self.probes)

    def effective(self) -> dict[str, Any]:
        """As JSON-able data, without what asks for nothing: a task that is not composed keeps its hash."""
        found: dict[str, Any] = {"stages": [dict(stage) for stage in self.stages], "order": self.order} if self.stages else {}
        if self.lengths:
            found["lengths"] = list(self.lengths)
        if self.probes:
            found["probes"] = [dict(probe) for probe in self.probes]
        return found


def read_composition(values: Mapping[str, Any], own: Mapping[str, Any], fixed: Sequence[str], path: str) -> Composition:
    """The composition out of a task's mapping. `own`: its settings with their values; `fixed`: those that no stage may change.

    `UserError` names the key: a wrong type, an order that there is none of, a length that is no factor, a setting twice.
    """
    order = values.get("order", "mixed")
    if order not in ORDERS:
        raise unknown("order", order, ORDERS, join(path, "order"))
    if "order" in values and not values.get("stages"):
        raise UserError(f"{join(path, 'order')}: {shown(order)} orders nothing; give `stages`")
    return Composition(
        stages=_settings(values.get("stages"), own, fixed, join(path, "stages"), empty=True),
        order=order,
        lengths=_lengths(values.get("lengths"), join(path, "lengths")),
        probes=_settings(values.get("probes"), own, fixed, join(path, "probes"), empty=False),
    )


def probe_name(settings: Settings) -> str:
    """`pairs_16`, `length_128_pairs_8`: letters, digits and `_` only, as a measurement's name needs."""
    return re.sub(r"[^A-Za-z0-9]+", "_", "_".join(f"{key}_{value}" for key, value in settings.items())).strip("_")


def _settings(value: Any, own: Mapping[str, Any], fixed: Sequence[str], path: str, empty: bool) -> tuple[Settings, ...]:
    """Mappings of settings, each without what it says in vain. `empty`: whether one may change nothing."""
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{path}: expected a list of mappings of settings, got {shown(value)}")
    found: list[Settings] = []
    for i, given in enumerate(value):
        if not isinstance(given, Mapping):
            raise UserError(f"{item(path, i)}: expected a mapping of settings such as {{length: 128}}, got {shown(given)}")
        for key in given:
            if key in fixed:
                raise UserError(f"{join(item(path, i), key)}: says where data lie; it is the same in the whole task")
            if key not in own:
                raise unknown("setting", key, [name for name in own if name not in fixed], join(item(path, i), key))
        changed = {str(key): one for key, one in given.items() if type(one) is not type(own[key]) or one != own[key]}
        if not changed and not empty:
            raise UserError(f"{item(path, i)}: {shown(given)} is the task's own setting, which is measured anyway")
        if not empty and changed in found:
            raise UserError(f"{item(path, i)}: {shown(given)} stands twice")
        found.append(changed)
    return tuple(found)


def _lengths(value: Any, path: str) -> tuple[int, ...]:
    """Factors over 1, ascending (1 is the test split itself)."""
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{path}: expected a list of factors such as [1, 2, 4], got {shown(value)}")
    for i, factor in enumerate(value):
        if isinstance(factor, bool) or not isinstance(factor, int) or not 1 <= factor <= LONGEST:
            raise UserError(f"{item(path, i)}: {shown(factor)} is no factor (an integer from 1 to {LONGEST})")
        if factor in value[:i]:
            raise UserError(f"{item(path, i)}: {factor} stands twice")
    return tuple(sorted(factor for factor in value if factor > 1))
