"""`deltalab describe` of a task, a study, and a study that was run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from ...strict import plain
from .describe_component import options_table

_OF_EVERY_TASK = {
    "stages": ("a list of settings", "train on these settings of the task instead of its own"),
    "order": ("mixed | staged", "stages together in every epoch, or one after the other"),
    "lengths": ("a list of factors", "also measured on examples that many times as long"),
    "probes": ("a list of settings", "also measured in these settings"),
}
"""The keys of `platform.tasks.composition`."""


def describe_task(cls: Any, out: Console) -> None:
    """A task's settings, those that every task has, and its presets in full."""
    out.print(f"[bold]{cls.name}[/] v{cls.version}  {escape(cls.summary)}\n")
    options_table(cls.Config, out)
    table = Table(header_style="bold", box=None, padding=(0, 2, 0, 0))
    for column in ("of every task", "valid", "meaning"):
        table.add_column(column, overflow="fold")
    for key, (valid, meaning) in _OF_EVERY_TASK.items():
        table.add_row(key, escape(valid), escape(meaning))
    out.print(table)
    out.print()
    for preset, values in cls.presets.items():
        own = {key: value for key, value in values.items() if key not in _OF_EVERY_TASK}
        out.print(f"preset [bold]{escape(preset)}[/]: {escape(_settings(own))}")
        for key in _OF_EVERY_TASK:
            if key in values:
                out.print(Padding(f"{key}: {escape(_listed(values[key]))}", (0, 0, 0, 4)))


def _settings(values: Mapping[str, Any]) -> str:
    """`length 64, pairs 4`."""
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _listed(value: Any) -> str:
    """A list of settings or factors, or a word."""
    if not isinstance(value, (list, tuple)):
        return str(value)
    if all(isinstance(one, Mapping) for one in value):
        return "; ".join(_settings(one) for one in value)
    return ", ".join(f"{one}x" for one in value)


def describe_study(name: str, out: Console) -> None:
    """A shipped study: axes, seeds, settings."""
    from ..config import load_study

    study = load_study(name)
    out.print(f"[bold]{name}[/]  {escape(study.description)}\n")
    for part in study.parts:
        out.print(f"[bold]{part.name or name}[/]: seeds {list(part.seeds)}")
        for axis, values in part.axes.items():
            out.print(f"  {axis}: {escape(', '.join(map(_flow, values)))}")
        for section, content in part.base.items():
            if content:
                settings = ", ".join(f"{key} {_flow(value)}" for key, value in content.items())
                out.print(f"  {section}: {escape(settings)}")


def _flow(value: Any) -> str:
    """A value as it stands in YAML, on one line."""
    import yaml

    if not isinstance(value, (Mapping, list, tuple)):
        return str(value)
    return yaml.safe_dump(plain(value), default_flow_style=True, sort_keys=False, width=10**6).strip()


def describe_launch(name: str, root: str | None, out: Console) -> None:
    """The latest launch of a study under the data root."""
    from ..config import DataRoot
    from ..tracking import Ledger

    with Ledger.open(DataRoot.find(root).ledger, create=False) as ledger:
        launch = ledger.latest_launch(name)
    if launch is None:
        return
    out.print(f"[bold]{escape(name)}[/]  launch {launch.id}, {launch.status}, {launch.created_at:%Y-%m-%d %H:%M} UTC")
    out.print(f"  {escape(launch.command)}", soft_wrap=True)
    for part in launch.config["parts"]:
        compared = f"{', '.join(part['arms'])} (baseline {part['baseline']}, {part['metric']} on {part['task']})"
        out.print(f"  {escape(part['name'] or name)}: {escape(compared)}")
