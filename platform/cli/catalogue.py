"""`deltalab list` and `deltalab describe`: what there is, and what it means."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...errors import unknown
from .app import Root, console

if TYPE_CHECKING:
    from ..tracking import StudyRow

KINDS = ("recurrences", "components", "tasks", "studies")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("list")(list_things)
    app.command("describe")(describe)


def list_things(
    kind: Annotated[
        str | None, typer.Argument(metavar="[recurrences|components|tasks|studies]", help="What to list; default: all.")
    ] = None,
    root: Root = None,
) -> None:
    """List recurrences, components, tasks and studies: the shipped ones, and those that were run under the data root.

    Examples:

      deltalab list

      deltalab list components
    """
    if kind is not None and kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    out = console()
    for chosen in [kind] if kind else KINDS:
        table = Table(title=chosen, title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2))
        for row in [*_ROWS[chosen](), *(_run_studies(root) if chosen == "studies" else [])]:
            table.add_row(*[escape(cell) for cell in row])
        out.print(table)
        out.print()


def _recurrences() -> list[tuple[str, ...]]:
    from ... import registry
    from ...recurrences import RecurrenceSpec

    rows: list[tuple[str, ...]] = []
    for name in registry.names():
        spec = registry.load(name)
        words = ["no recurrence"]
        if isinstance(spec, RecurrenceSpec):
            words = [
                f"{axis.replace('_', ' ')} {choice.name}" for axis, choice in spec.choices().items() if choice.name != "none"
            ]
            words += ["no erase"] if spec.erase == "none" else []
        rows.append((name, spec.about.title, ", ".join(words)))
    return rows


def _components() -> list[tuple[str, ...]]:
    from ...recurrences import AXES, components

    rows = [(axis, name, cls.equation()) for axis in AXES for name, cls in components(axis).items()]
    return [*rows, ("erase", "delta", "e_t = v_t - S~^T r_t"), ("erase", "none", "e_t = v_t")]


def _tasks() -> list[tuple[str, ...]]:
    from ..tasks import task_class, task_names

    found = [task_class(name) for name in task_names()]
    return [(cls.name, f"v{cls.version}", cls.summary, f"presets: {', '.join(cls.presets) or 'none'}") for cls in found]


def _studies() -> list[tuple[str, ...]]:
    from ..config import load_study, study_names

    return [(name, load_study(name).description) for name in study_names()]


def _run_studies(root: str | None) -> list[tuple[str, ...]]:
    """The studies of the ledger, with where their trials stand."""
    return [
        (row.study, f"run here: {row.finished} of {row.trials} trials finished, {row.launches} launches")
        for row in _ledger_studies(root)
    ]


def _ledger_studies(root: str | None) -> list[StudyRow]:
    from ..config import DataRoot
    from ..tracking import Ledger, NoResultsError

    try:
        with Ledger.open(DataRoot.find(root).ledger, create=False) as ledger:
            return ledger.studies()
    except NoResultsError:
        return []


_ROWS = {"recurrences": _recurrences, "components": _components, "tasks": _tasks, "studies": _studies}


def describe(
    name: Annotated[str, typer.Argument(help="A recurrence, component, task or study; or a card's YAML file.")],
    root: Root = None,
) -> None:
    """Explain one recurrence, component, task or study: equation, source, settings, caveats.

    A study may also be one that was run under the data root: its latest launch is shown.

    Examples:

      deltalab describe osdn

      deltalab describe hypergradient

      deltalab describe mqar
    """
    from ... import registry
    from ...recurrences import AXES, components
    from ..config import study_names
    from ..tasks import task_class, task_names

    out = console()
    found = False
    if name in registry.names() or name.endswith((".yaml", ".yml")):
        _describe_card(name, out)
        found = True
    for axis in AXES:
        if name in components(axis):
            _describe_component(components(axis)[name], out)
            found = True
    if name in task_names():
        _describe_task(task_class(name), out)
        found = True
    if name in study_names():
        _describe_study(name, out)
        found = True
    run_here = [row.study for row in _ledger_studies(root)]
    if name in run_here:
        _describe_launch(name, root, out)
        found = True
    if not found:
        everything = [
            *registry.names(),
            *(n for axis in AXES for n in components(axis)),
            *task_names(),
            *study_names(),
            *run_here,
        ]
        raise unknown("name", name, set(everything))


def _describe_card(name: str, out: Console) -> None:
    from ... import registry
    from ...recurrences import LanguageModel, RecurrenceSpec

    spec = registry.load(name)
    out.print(f"[bold]{escape(spec.name)}[/]  {escape(spec.about.title)}   [dim]{escape(spec.about.source)}[/]\n")
    for line in spec.about.equation.strip().splitlines():
        out.print(f"    {escape(line)}")
    out.print()
    if isinstance(spec, RecurrenceSpec):
        table = Table(show_header=False, box=None, padding=(0, 2))
        for axis, choice in spec.choices().items():
            table.add_row(axis.replace("_", " "), escape(str(choice)), escape(choice.component.equation()))
        table.add_row("erase", spec.erase, "")
        table.add_row("q, k", f"features {spec.qk.feature_map}", f"normalise q {spec.qk.normalise_q}, k {spec.qk.normalise_k}")
        out.print(table)
    model = LanguageModel(spec, vocab=256, width=64, layers=2, heads=2, seed=0)
    out.print(f"\n2 layers, width 64, 2 heads, 256 tokens of vocabulary: {model.parameter_count():,} parameters, "
              f"{model.state_bytes(1024):,} bytes of state after 1,024 tokens")  # fmt: skip
    for caveat in spec.about.caveats:
        out.print(f"\n[yellow]caveat[/] {escape(caveat)}")


def _describe_component(cls: Any, out: Console) -> None:
    out.print(f"[bold]{cls.name}[/]  ({cls.axis.replace('_', ' ')})")
    out.print(f"\n    {escape(cls.equation())}\n")
    rest = [line.strip() for line in (cls.__doc__ or "").strip().splitlines()[1:]]
    out.print(escape("\n".join(rest).strip()) or "")
    _options(cls.Config, out)


def _describe_task(cls: Any, out: Console) -> None:
    out.print(f"[bold]{cls.name}[/] v{cls.version}  {escape(cls.summary)}\n")
    _options(cls.Config, out)
    for preset, values in cls.presets.items():
        out.print(f"preset [bold]{preset}[/]: {', '.join(f'{key} {value}' for key, value in values.items())}")


def _describe_study(name: str, out: Console) -> None:
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


def _describe_launch(name: str, root: str | None, out: Console) -> None:
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


def _options(config: Any, out: Console) -> None:
    fields = dataclasses.fields(config)
    if not fields:
        return
    table = Table(header_style="bold", box=None, padding=(0, 2))
    for column in ("option", "default", "meaning"):
        table.add_column(column)
    for field in fields:
        table.add_row(field.name, escape(str(field.default)), escape(field.metadata.get("help", "")))
    out.print(table)
