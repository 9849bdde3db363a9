"""`deltalab describe` of a recurrence: what it computes, what it is made of, what it costs, and how it differs from another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...errors import UserError
from .describe_component import Row, parameter_rows, parameters_table

if TYPE_CHECKING:
    from ...recurrences import LayerSpec, MixerSpec

CONTEXT = 1024
"""Tokens after which state and cost are counted: those of attention grow."""


@dataclass(frozen=True)
class Cost:
    """Sizes of a recurrence, summed over the layers of its pattern."""

    parameters: int
    state: int
    flops: int

    def rows(self) -> list[tuple[str, str]]:
        return [
            ("parameters", f"{self.parameters:,}"),
            ("state", f"{self.state:,} bytes a sequence"),
            ("forward", f"{self.flops:,} FLOPs a token"),
        ]


def cost(layers: tuple[LayerSpec, ...], width: int, heads: int) -> Cost:
    """Counted on the meta device: no memory, whatever the width."""
    import torch

    from ...recurrences import Mixer

    with torch.device("meta"):
        mixers = [Mixer(layer, width, heads) for layer in layers]
        return Cost(
            sum(parameter.numel() for mixer in mixers for parameter in mixer.parameters()),
            sum(mixer.state_bytes(CONTEXT) for mixer in mixers),
            sum(mixer.flops_per_token(CONTEXT) for mixer in mixers),
        )


@contextmanager
def buildable(name: str, width: int, heads: int) -> Iterator[None]:
    """A component of somebody else that cannot be built is their mistake to see, not a traceback of ours."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        where = f"at width {width} with {heads} heads"
        raise UserError(
            f"{name}: cannot be built {where}: {type(error).__name__}: {error}. `deltalab certify` says more"
        ) from error


def describe_card(name: str, width: int, heads: int, out: Console) -> None:
    """A card, or every kind of layer of a pattern."""
    from ... import registry
    from ...recurrences import HybridSpec, layers_of

    spec = registry.load(name)
    _head(spec, _origin(name), out)
    if isinstance(spec, HybridSpec):
        for layer, places in _distinct(spec):
            out.rule(f"layers {places}: {escape(layer.name)}", align="left", style="dim")
            _layer(layer, width, heads, out)
    else:
        _layer(spec, width, heads, out)
    layers = layers_of(spec)
    what = "a layer" if len(layers) == 1 else f"{len(layers)} layers"
    out.print(f"\n[bold]cost[/] of {what} at width {width} with {heads} heads, after {CONTEXT:,} tokens")
    _two_columns(cost(layers, width, heads).rows(), out)
    for warning in spec.warnings():
        out.print(f"\n[red]warning[/] {escape(warning)}")
    for caveat in spec.about.caveats:
        out.print(f"\n[yellow]caveat[/] {escape(caveat)}")
    out.print("\n[dim]In what it differs from another:[/] deltalab describe "
              f"{escape(repr(name) if ' ' in name else name)} --against CARD", soft_wrap=True)  # fmt: skip


def _origin(name: str) -> str:
    from ...registry.sources import sources

    card = sources().cards.get(name)
    return "" if card is None or card.origin == "deltalab" else f"{card.origin}: {card.place}"


def _head(spec: MixerSpec, origin: str, out: Console) -> None:
    about = spec.about
    words = [f"[bold]{escape(spec.name)}[/]", escape(about.title), f"[dim]{escape(about.source)}[/]", escape(origin)]
    out.print("   ".join(word for word in words if word) + "\n")
    for line in about.equation.strip().splitlines():
        out.print(f"    {escape(line)}")
    if about.equation.strip():
        out.print()


def _distinct(spec: Any) -> list[tuple[LayerSpec, str]]:
    """Every kind of layer of a hybrid, and where it stands in the pattern."""
    kinds: dict[str, tuple[Any, list[int]]] = {}
    for i, layer in enumerate(spec.layers):
        kinds.setdefault(str(layer.effective()), (layer, []))[1].append(i)
    return [(layer, ", ".join(map(str, places))) for layer, places in kinds.values()]


def _layer(layer: LayerSpec, width: int, heads: int, out: Console) -> None:
    from ...recurrences import Mixer, RecurrenceSpec

    if not isinstance(layer, RecurrenceSpec):
        _two_columns([("rope base", f"{layer.rope_base:g}"), ("window", str(layer.window or "none"))], out)
        _two_columns([("block", _settings(layer.effective()["block"]))], out)
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for axis, choice in layer.choices().items():
        table.add_row(axis.replace("_", " "), escape(str(choice)), escape(choice.component.equation()))
    out.print(table)
    content = layer.effective()
    rows = [("substeps", str(layer.substeps)), ("q and k", _settings(content["qk"])), ("block", _settings(content["block"]))]
    _two_columns(rows, out)
    import torch

    with torch.device("meta"):
        shape = Mixer(layer, width, heads).shape
    parameters: list[Row] = []
    for axis, choice in layer.choices().items():
        if axis != "forgetting" or layer.remembers:
            parameters += parameter_rows(axis.replace("_", " "), choice.component, choice.config, shape)
    out.print()
    title = f"parameters of components: width {width}, {heads} heads, key width {shape.key}, value width {shape.value}"
    parameters_table(parameters, title, out)
    out.print("\n[bold]as a regression at test time[/]")
    _two_columns(list(layer.regression_view().items()), out)


def _settings(content: dict[str, Any]) -> str:
    from ...registry.compare import word

    return ", ".join(f"{key} {word(value)}" for key, value in content.items())


def _two_columns(rows: list[tuple[str, str]], out: Console) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for left, right in rows:
        table.add_row(escape(left), escape(right))
    out.print(table)


def describe_against(name: str, other: str, width: int, heads: int, out: Console) -> None:
    """Two recurrences side by side: equations, every choice in which they differ, cost."""
    from ... import registry
    from ...registry.compare import ABSENT, side_by_side

    specs = registry.load(name, "describe"), registry.load(other, "--against")
    found = registry.differences(*specs)
    layers = side_by_side(*specs)
    table = Table(header_style="bold", box=None, padding=(0, 2, 0, 0))
    for column in ("", specs[0].name, specs[1].name):
        table.add_column(escape(column), overflow="fold")
    for label in ("title", "equation", "source"):
        cells = [getattr(spec.about, label).strip() for spec in specs]
        if any(cells):
            table.add_row(label, *[escape(cell) for cell in cells])
    table.add_row()
    for place, left, right in found:
        table.add_row(escape(place), f"[yellow]{escape(left)}[/]", f"[yellow]{escape(right)}[/]")
    table.add_row()
    for (label, left), (_, right) in zip(*(cost(side, width, heads).rows() for side in layers), strict=True):
        table.add_row(label, left, right)
    out.print(table)
    counted = "a layer" if len(layers[0]) == 1 else f"{len(layers[0])} layers"
    out.print(f"\n[dim]parameters, state and forward: {counted} at width {width} with {heads} heads, after {CONTEXT:,} tokens[/]")
    if not found:
        out.print("They compute the same: no choice differs.")
        return
    same = _same(layers)
    if same:
        out.print(f"The same in both: {escape(same)}.")
    if any("block." in place and ABSENT not in (left, right) for place, left, right in found):
        out.print("[yellow]note[/] They differ in the block as well; a fair comparison shares it (model.block in a study).")


def _same(layers: tuple[tuple[LayerSpec, ...], tuple[LayerSpec, ...]]) -> str:
    """The axes on which every layer of both sides has made the same choice."""
    from ...recurrences import AXES, RecurrenceSpec

    every = [layer for side in layers for layer in side]
    if not all(isinstance(layer, RecurrenceSpec) for layer in every):
        return ""
    contents = [layer.effective() for layer in every]
    axes = [axis for axis in AXES if all(content[axis] == contents[0][axis] for content in contents)]
    return ", ".join(f"{axis.replace('_', ' ')} {contents[0][axis]['name']}" for axis in axes)
