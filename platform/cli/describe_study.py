"""`deltalab describe` of a task, a study, and a study that was run."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape

from .describe_component import options_table


def describe_task(cls: Any, out: Console) -> None:
    """A task's settings and presets."""
    out.print(f"[bold]{cls.name}[/] v{cls.version}  {escape(cls.summary)}\n")
    options_table(cls.Config, out)
    for preset, values in cls.presets.items():
        out.print(f"preset [bold]{preset}[/]: {', '.join(f'{key} {value}' for key, value in values.items())}")


def describe_study(name: str, out: Console) -> None:
    """A shipped study: axes, seeds, settings."""
    from ..config import load_study

    study = load_study(name)
    out.print(f"[bold]{name}[/]  {escape(study.description)}\n")
    for part in study.parts:
        out.print(f"[bold]{part.name or name}[/]: seeds {list(part.seeds)}")
        for axis, values in part.axes.items():
            out.print(f"  {axis}: {escape(', '.join(map(str, values)))}")
        for section, content in part.base.items():
            if content:
                settings = ", ".join(f"{key} {value}" for key, value in content.items())
                out.print(f"  {section}: {escape(settings)}")


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
