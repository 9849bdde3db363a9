"""The model card of an exported trial: what it is, where it comes from, what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from ... import __version__, registry
from ...recurrences import layers_of
from ..study import measure_of
from .trial import Trained

_SHOWN = ("test/", "validation/", "model/")


def model_card(trained: Trained, measurements: Mapping[str, float | None], text: bool) -> str:
    """Markdown with the YAML head that Hugging Face reads. `text`: whether there is a tokenizer."""
    row, sizes = trained.row, trained.settings
    head: dict[str, Any] = {"library_name": "transformers", "tags": ["deltalab", "linear-recurrence", trained.spec.name]}
    if text:
        head["pipeline_tag"] = "text-generation"
    where = "/".join(word for word in (row.study, row.part) if word)
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {row.arm}, seed {row.seed} of the study {where}",
        f"A language model of {sizes.layers} layers, width {sizes.width}, {sizes.heads} heads, trained by deltalab {__version__} "
        f"on the task `{row.task}` (version {row.task_version}) for {trained.training.steps} steps.",
        "## Recurrence",
        *_recurrences(trained),
        "## Use",
        _usage(trained, text),
        "## Measured",
        _table(measurements),
        "## Provenance",
        _provenance(trained),
    ]
    return "\n\n".join(parts) + "\n"


def _recurrences(trained: Trained) -> list[str]:
    """Title, equation and source of the cards that the layers are of; what a study changed in them is in `trial.yaml`."""
    found = []
    for layer in dict.fromkeys(layers_of(trained.spec)):
        about = registry.load(layer.name).about if layer.name in registry.names() else layer.about
        equation = f"```\n{about.equation.strip()}\n```" if about.equation.strip() else ""
        source = f"Source: {about.source}" if about.source else ""
        found += [part for part in (f"**{about.title or about.name}** (`{about.name}`)", equation, source) if part]
    return found


def _usage(trained: Trained, text: bool) -> str:
    imports = ["import deltalab  # makes the model's type known"]
    foreign = sorted(set(trained.row.config.get("plugins", {}).values()))
    imports += [f"# needs the plug-in {whose}" for whose in foreign]
    if text:
        lines = [
            *imports,
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")',
            'inputs = tokenizer("def main(", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))",
        ]
    else:
        lines = [
            *imports,
            "from transformers import AutoModelForCausalLM",
            "",
            'model = AutoModelForCausalLM.from_pretrained(".")  # its tokens are the numbers of the task',
        ]
    return "```python\n" + "\n".join(lines) + "\n```"


def _table(measurements: Mapping[str, float | None]) -> str:
    """Measurements of the whole splits and of the probes, not of every slice."""
    rows = ["| measurement | value |", "|---|---:|"]
    for name, value in sorted(measurements.items()):
        measure = measure_of(name)
        if name.startswith(_SHOWN) and name.count("/") <= 2 and "position_" not in name and value is not None and measure:
            rows.append(f"| {name} | {value:{measure.format}} {measure.unit} |".replace("  |", " |"))
    return "\n".join(rows)


def _provenance(trained: Trained) -> str:
    row = trained.row
    finished = f"{row.finished_at:%Y-%m-%d %H:%M} UTC" if row.finished_at else "unknown"
    source = str(trained.data.details.get("source", trained.data.name))
    lines = {
        "trial": f"`{row.hash}` ({trained.name})",
        "data": f"{source}, digest `{row.dataset_digest}`",
        "backend": row.backend or "unknown",
        "finished": finished,
        "everything that decided the numbers": "`trial.yaml`",
    }
    return "\n".join(f"* {name}: {value}" for name, value in lines.items())
