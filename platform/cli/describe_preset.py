"""`deltalab describe` of a preset: the shape of a published model, and what it counts here."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...recurrences.presets import Preset, TrainingSetup
from ...strict import plain


def describe_preset(preset: Preset, out: Console) -> None:
    """Its shape, each of its cards with the parameters counted and published, its training set-up, its caveats."""
    aliases = f"  (also {', '.join(preset.aliases)})" if preset.aliases else ""
    out.print(f"[bold]{escape(preset.name)}[/]{escape(aliases)}  {escape(preset.title)}   [dim]{escape(preset.source)}[/]\n")
    shape = {key: getattr(preset, key) for key in ("vocab", "width", "layers", "heads", "mlp_hidden", "tied")}
    out.print("  " + ", ".join(f"{key} {value}" for key, value in {**shape, **preset.block}.items()))
    out.print()
    out.print(_cards(preset))
    told = {key: value for key, value in plain(preset.training).items() if value != plain(TrainingSetup())[key]}
    if told:
        out.print(f"\ntrained with {', '.join(f'{key} {value}' for key, value in told.items())}")
    for caveat in preset.caveats:
        out.print(f"\n[yellow]note[/] {escape(caveat)}")
    out.print(f"\nIn a study: model: {{preset: {preset.name}}}; in Python: registry.presets.load({preset.name!r})")


def _cards(preset: Preset) -> Table:
    """One row a card that the source trained: what is different for it, and its size."""
    from ...registry import presets

    table = Table(header_style="bold", box=None, padding=(0, 2))
    for column in ("card", "parameters", "published", "otherwise than above"):
        table.add_column(column, justify="right" if column in ("parameters", "published") else "left")
    for card in preset.cards:
        with torch.device("meta"):
            count = presets.language_model(preset, card).parameter_count()
        other = next((variation for variation in preset.variations if card in variation.cards), None)
        changes = {} if other is None else {"layers": other.layers, "heads": other.heads, **other.block}
        words = ", ".join(f"{key} {value}" for key, value in changes.items() if value)
        published = preset.parameters.get(card, "")
        said = f"{published:,}" if isinstance(published, int) else str(published)
        table.add_row(card, f"{count:,}", escape(said), escape(words))
    return table
