"""`deltalab describe` of a component: equation, options with their limits, parameters with their initial values."""

from __future__ import annotations

import dataclasses
import inspect
import math
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

if TYPE_CHECKING:
    from torch import Tensor, nn

_TYPES = {int: "integer", float: "number", bool: "true or false", str: "text"}


def describe_component(cls: Any, width: int, heads: int, out: Console) -> None:
    """Everything that its author has declared, and what it is built from at this size."""
    from ...recurrences.component import origin

    whose = origin(cls)
    mark = "" if whose == "deltalab" else f"   [dim]from {escape(whose)}[/]"
    out.print(f"[bold]{escape(cls.name)}[/]  ({cls.axis.replace('_', ' ')}){mark}")
    out.print()
    out.print(Padding(escape(cls.equation()), (0, 0, 1, 4)))
    for paragraph in _paragraphs(cls):
        out.print(escape(paragraph))
        out.print()
    options_table(cls.Config, out)
    try:
        rows = parameter_rows(cls.name, cls, cls.Config(), _shape(width, heads))
    except Exception as error:
        out.print(f"[red]cannot be built[/] at width {width} with {heads} heads: {escape(f'{type(error).__name__}: {error}')}")
        return
    parameters_table(rows, f"parameters at width {width}, {heads} heads", out, skip=1)


def _paragraphs(cls: Any) -> list[str]:
    """The docstring below its first line, each paragraph on one line (an indented one as it stands)."""
    _, _, rest = inspect.cleandoc(cls.__doc__ or "").partition("\n")
    parts = [part.strip("\n") for part in rest.split("\n\n") if part.strip()]
    return [part if any(line.startswith(" ") for line in part.splitlines()) else " ".join(part.split()) for part in parts]


def _shape(width: int, heads: int) -> Any:
    from ...recurrences import Block
    from ...recurrences.mixer import head_shape

    return head_shape(width, heads, Block())


def options_table(config: Any, out: Console) -> None:
    """Option, default, limits and meaning of a configuration."""
    fields = dataclasses.fields(config)
    if not fields:
        return
    hints = typing.get_type_hints(config)
    table = Table(header_style="bold", box=None, padding=(0, 2, 0, 0))
    for column in ("option", "default", "valid", "meaning"):
        table.add_column(column, overflow="fold")
    for field in fields:
        default = _default(field)
        row = (field.name, default, _valid(hints[field.name], field.metadata), field.metadata.get("help", ""))
        table.add_row(*[escape(str(cell)) for cell in row])
    out.print(table)
    out.print()


def _default(field: dataclasses.Field[Any]) -> str:
    from ...registry.compare import word

    if field.default_factory is not dataclasses.MISSING:
        return word(field.default_factory())
    return "required" if field.default is dataclasses.MISSING else word(field.default)


def _valid(hint: Any, limits: Mapping[str, Any]) -> str:
    """`from 0 to 2`, `above 0`, `write | query | both`, or the type."""
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(str, typing.get_args(hint)))
    if limits.get("choices"):
        return " | ".join(map(str, limits["choices"]))
    signs = {"min": ">=", "above": ">", "max": "<=", "below": "<"}
    of = f"{len(typing.get_args(hint))} numbers" if typing.get_origin(hint) is tuple else ""
    words = ", ".join(f"{sign} {limits[key]:g}" for key, sign in signs.items() if limits.get(key) is not None)
    return " ".join(part for part in (of, words) if part) or _TYPES.get(hint, "")


Row = tuple[str, str, str, str]
"""(component, parameter, shape, initial value)"""


def parameter_rows(label: str, cls: Any, config: Any, shape: Any) -> list[Row]:
    """The parameters of one component. Shapes come from the meta device; values from a build for a narrow model, since what a
    component starts from does not depend on the model's width."""
    import torch

    from ...recurrences import initialise

    with torch.device("meta"):
        module = cls(config, shape)
    narrow = cls(config, dataclasses.replace(shape, width=min(shape.width, 64)))
    initialise(narrow, 0)
    values = dict(narrow.named_parameters())
    owners = _owners(module)
    return [
        (label, name, " x ".join(map(str, tensor.shape)) or "1", _start(owners[name], name.rpartition(".")[2], values[name]))
        for name, tensor in module.named_parameters()
    ]


def _owners(module: nn.Module) -> dict[str, nn.Module]:
    return {
        f"{prefix}.{name}" if prefix else name: part
        for prefix, part in module.named_modules()
        for name, _ in part.named_parameters(recurse=False)
    }


def _start(owner: Any, name: str, value: Tensor) -> str:
    """`N(0, 0.02)` for a projection, the number for a constant, else the range that was drawn from seed 0."""
    from ...recurrences.layers import Projection

    if isinstance(owner, Projection):
        if name == "bias":
            return f"{owner.bias_value:g}"
        return f"N(0, {owner.std:g})" if owner.std else "0"
    if value.numel() == 0:
        return ""
    low, high = float(value.detach().min()), float(value.detach().max())
    if math.isnan(low) or math.isnan(high):
        return "not a number"
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g} (drawn)"


def parameters_table(rows: list[Row], title: str, out: Console, skip: int = 0) -> None:
    """The rows as a table, without their first `skip` columns; a line where there is none."""
    if not rows:
        out.print("no parameters")
        return
    out.print(f"[dim]{escape(title)}[/]")
    table = Table(header_style="bold", box=None, padding=(0, 2, 0, 0))
    for column in ("component", "parameter", "shape", "initial value")[skip:]:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*[escape(cell) for cell in row[skip:]])
    out.print(table)
