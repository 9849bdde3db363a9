"""Which plug-ins a recurrence's components come from."""

from __future__ import annotations

from collections.abc import Mapping

from ..plugins import check_same
from ..recurrences import AXES, MixerSpec, RecurrenceSpec, layers_of
from ..recurrences.component import origin


def origins(spec: MixerSpec) -> dict[str, str]:
    """`{"gate my_gate": "my-gates 1.0 (3f2a9c1b)"}` for every component that is not deltalab's own; mostly empty."""
    found: dict[str, str] = {}
    for layer in layers_of(spec):
        for axis, choice in layer.choices().items() if isinstance(layer, RecurrenceSpec) else ():
            if (whose := origin(choice.component)) != "deltalab":
                found[f"{axis} {choice.name}"] = whose
    return dict(sorted(found.items()))


def check_origins(spec: MixerSpec, planned: Mapping[str, str]) -> None:
    """`UserError` where this process has other code for a component than the one that planned the trial."""
    check_same(origins(spec), {what: whose for what, whose in planned.items() if what.split()[0] in AXES})
