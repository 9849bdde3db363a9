"""Whole models on the GPU's kernels, in Triton's interpreter: a training step and decoding, in float32 and under autocast,
against the same models in plain torch. Prints one JSON object per card. Its own process, as interpreted.py.

Half precision is float16 here: the interpreter's bfloat16 is wrong.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from deltalab import registry
from deltalab.kernels import first_use
from deltalab.kernels import triton as gpu
from deltalab.kernels.cpu import convolution, norm
from deltalab.kernels.triton import launch
from deltalab.recurrences import LanguageModel

CARDS = ("gdn", "pgdn", "osdn", "kda", "mamba2")
VOCAB, TOKENS, PROMPT = 40, 40, 36
SIZES: dict[str, Any] = {"width": 32, "layers": 1, "heads": 2, "mlp_hidden": 48, "init_std": 0.2, "output_gate": "silu"}


@contextmanager
def a_gpu(launched: set[str], serves: bool) -> Iterator[None]:
    """The CPU passes for one, and `launched` is told the kernels; `serves` False: for a machine that has nothing but torch."""
    run, held = launch.run, (first_use.holds, first_use.layers_hold)
    others = (gpu.available, norm.serves, convolution.serves)

    def told(kernel: Any, *given: Any, **options: Any) -> None:
        launched.add(kernel.__name__)
        run(kernel, *given, **options)

    gpu.available = first_use.layers_hold = lambda device: serves  # type: ignore[assignment]
    first_use.holds, launch.run = lambda *call: True, told  # type: ignore[assignment]
    norm.serves = convolution.serves = lambda x: False
    try:
        yield
    finally:
        launch.run, (first_use.holds, first_use.layers_hold) = run, held  # type: ignore[assignment]
        gpu.available, norm.serves, convolution.serves = others


def outcome(card: str, backend: str, half: bool) -> dict[str, Tensor]:
    """The loss and every gradient of a step; the logits of the last tokens, decoded one by one after a prompt."""
    model = LanguageModel(registry.load(card), vocab=VOCAB, backend=backend, seed=0, **SIZES)
    tokens = torch.randint(VOCAB, (2, TOKENS + 1), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.float16, enabled=half):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            _, state = model(tokens[:, :PROMPT], state=model.initial_state(2))
            logits = []
            for t in range(PROMPT, TOKENS):
                found, state = model(tokens[:, t : t + 1], state=state)
                logits.append(found)
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "decoded": torch.cat(logits, dim=1), **gradients}


def compare(card: str) -> dict[str, Any]:
    launched: set[str] = set()
    with a_gpu(set(), serves=False):
        exact = outcome(card, "torch", half=False)
    errors = {}
    with a_gpu(launched, serves=True):
        for name, half in (("float32", False), ("float16", True)):
            found = outcome(card, "triton", half)
            assert found.keys() == exact.keys()
            errors[name] = {key: float((found[key].float() - x).norm() / x.norm().clamp(min=1e-12)) for key, x in exact.items()}
    return {"card": card, "launched": sorted(launched), "errors": errors}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for card in sys.argv[1:] or CARDS:
        print(json.dumps(compare(card)), flush=True)
