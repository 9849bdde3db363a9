"""A finished trial as a Hugging Face folder: configuration, safetensors, tokenizer, model card, the frozen trial."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from ... import __version__
from ...errors import UserError
from ...recurrences import LanguageModel
from ...recurrences.language_model import mlp_width
from ..tasks.tokenizers import load_tokenizer
from .card import model_card
from .trial import Trained

TOLERANCE = 1e-5
"""Logits of the exported model may differ from the trial's by as much."""
CHECKED_TOKENS, GENERATED_TOKENS = 64, 16


@dataclass(frozen=True)
class Exported:
    """What stands in the folder, and how it was checked."""

    folder: Path
    files: tuple[str, ...]
    bytes: int
    logits_difference: float


def export(
    trained: Trained, folder: Path, cache: Path, measurements: Mapping[str, float | None], force: bool = False
) -> Exported:
    """Write the folder, load it again as a user would, and compare: logits to 1e-5, greedy tokens exactly.

    The folder appears whole or not at all. `UserError` where it holds something already (without `force`) or cannot be written;
    `RuntimeError` where the loaded model is not the trial's.
    """
    folder = folder.expanduser().absolute()
    _check_folder(folder, force)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise UserError(f"folder: {str(folder)!r} cannot be written: {error.strerror}") from error
    try:
        temporary.chmod(0o755)
        _write(trained, temporary, cache, measurements)
        difference = _check(trained, temporary)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    except OSError as error:
        raise UserError(f"folder: {str(folder)!r} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return Exported(folder, tuple(file.name for file in files), sum(file.stat().st_size for file in files), difference)


def _check_folder(folder: Path, force: bool) -> None:
    if folder.is_file():
        raise UserError(f"folder: {str(folder)!r} is a file")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    ours = (folder / "config.json").is_file() and (folder / "trial.yaml").is_file()
    if not ours:
        raise UserError(f"folder: {str(folder)!r} holds other files; give a new or empty folder")
    if not force:
        raise UserError(f"folder: {str(folder)!r} holds an exported trial already; --force replaces it")


def _write(trained: Trained, folder: Path, cache: Path, measurements: Mapping[str, float | None]) -> None:
    from ...recurrences.hugging_face.configuration import DeltalabConfig
    from ...recurrences.hugging_face.modeling import DeltalabForCausalLM

    ends: dict[str, Any] = {}
    text = "tokenizer" in trained.data.details
    if text:
        tokenizer = load_tokenizer(trained.data.details, cache)
        tokenizer.save(folder)
        ends = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.eos}
    sizes = trained.settings
    config = DeltalabConfig(
        recurrence={"name": trained.spec.name, **trained.spec.effective()},
        vocab_size=trained.data.vocab,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        intermediate_size=mlp_width(sizes.width, sizes.mlp_ratio, sizes.mlp_hidden),
        tie_word_embeddings=sizes.tied,
        deltalab_version=__version__,
        plugins=dict(trained.row.config.get("plugins", {})),
        trained_length=trained.data.length,
        **ends,
    )
    model = DeltalabForCausalLM(config)
    model.model.load_state_dict(trained.model.state_dict())
    with _quiet():
        model.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # the library leaves weights readable for their owner alone
    (folder / "trial.yaml").write_text(yaml.safe_dump(_plain(trained), sort_keys=False), encoding="utf-8")
    (folder / "README.md").write_text(model_card(trained, measurements, text), encoding="utf-8")


def _plain(trained: Trained) -> dict[str, Any]:
    row = trained.row
    known = {"trial": row.hash, "study": row.study, "part": row.part, "arm": row.arm, "seed": row.seed}
    return {**known, "dataset_digest": row.dataset_digest, "config": json.loads(json.dumps(row.config))}


def _check(trained: Trained, folder: Path) -> float:
    """The largest difference of the logits; `RuntimeError` where the loaded model is another one."""
    from transformers import AutoModelForCausalLM

    with _quiet():
        loaded = AutoModelForCausalLM.from_pretrained(folder).eval().to(trained.hardware.device)
    inputs, _ = trained.data.test.rows(np.arange(1))
    tokens = torch.from_numpy(np.ascontiguousarray(inputs[:, :CHECKED_TOKENS])).to(trained.hardware.device)
    with torch.no_grad():
        difference = float((loaded(tokens).logits - trained.model(tokens)).abs().max())
        generated = loaded.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=GENERATED_TOKENS,
            min_new_tokens=GENERATED_TOKENS,
            do_sample=False,
        )
    if not difference <= TOLERANCE:
        raise RuntimeError(f"the exported model's logits differ from the trial's by {difference:g}, more than {TOLERANCE:g}")
    end = loaded.config.eos_token_id
    expected = greedy(trained.model, tokens, GENERATED_TOKENS, never=end if isinstance(end, int) else None)
    if not torch.equal(generated[:, tokens.shape[1] :], expected):
        raise RuntimeError("the exported model generates other tokens than the trial's own decoding")
    return difference


@torch.no_grad()
def greedy(model: LanguageModel, tokens: torch.Tensor, count: int, never: int | None = None) -> torch.Tensor:
    """The likeliest next tokens [B, count] after `tokens` [B, T], decoded one by one with the state carried.

    `never`: a token that is not chosen.
    """
    logits, state = model(tokens, model.initial_state(len(tokens)))
    chosen = []
    while True:
        last = logits[:, -1:].float()
        if never is not None:
            last[..., never] = -torch.inf
        chosen.append(last.argmax(-1))
        if len(chosen) == count:
            return torch.cat(chosen, dim=1)
        logits, state = model(chosen[-1], state)


class _quiet:  # noqa: N801
    """transformers draws no progress bars and says nothing within."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._level = logging.get_verbosity()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self._level)
        logging.enable_progress_bar()
