"""Which plug-ins a recurrence's components come from."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import UserError
from ..recurrences import MixerSpec, RecurrenceSpec, layers_of
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
    here = origins(spec)
    for component in sorted({*here, *planned}):
        if here.get(component) != planned.get(component):
            raise UserError(
                f"{component}: planned with {planned.get(component, 'deltalab')}, but this worker has "
                f"{here.get(component, 'deltalab')}; install the same plug-in wherever trials run"
            )
