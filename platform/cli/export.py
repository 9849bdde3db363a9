"""`deltalab export`: a finished trial as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from .app import Import, Root, console, use


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("export")(export)


def export(
    trial: Annotated[str, typer.Argument(help="A trial's hash (or its beginning), or STUDY/ARM, STUDY/PART/ARM, with @SEED.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write; new or empty.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a trial that was exported there before.")] = False,
    root: Root = None,
    modules: Import = None,
) -> None:
    """Write a finished trial as a Hugging Face folder, load it again, and compare.

    The folder has the configuration, the weights as safetensors, the tokenizer of a text task, a model card and the frozen trial.
    After `import deltalab`, `AutoModelForCausalLM.from_pretrained(DIR)` loads it and `generate` carries the recurrent state.
    Needs transformers: pip install 'deltalab[eval]'.

    Examples:

      deltalab export quick/text/gdn ./gdn-text

      deltalab export quick/recall/osdn@1 ./osdn --force

      deltalab export 3f2a9c1b ./model --root runs
    """
    from .extras import need

    need("transformers", "export")
    use(None, modules)
    out = console()
    from ..config import DataRoot
    from ..tracking import Ledger
    from ..trained import find_trial, load_trained
    from ..trained.export import export as write

    place = DataRoot.find(root)
    row = find_trial(place, trial)
    with out.status(f"exporting {escape(row.arm)} seed {row.seed} ..."):
        trained = load_trained(place, row)
        with Ledger.open(place.ledger, create=False) as ledger:
            measurements = ledger.measurements([row.id])[row.id]
        done = write(trained, folder, place.cache, measurements, force)
    out.print(f"{trained.name} -> {done.folder} ({done.bytes / 1e6:.1f} MB: {', '.join(done.files)})", highlight=False)
    out.print(
        f"Loaded again: logits differ by at most {done.logits_difference:.1e}, greedy tokens are the same.", highlight=False
    )
