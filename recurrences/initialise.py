"""One model-wide initialiser that cannot lose a component's initial value.

Every module that owns parameters sets them itself, in `initialise(generator)`, and the generator's seed depends on the module's
name and the trial's seed alone. So two arms of a study start from the same embeddings and projections wherever they share them,
and a parameter that nobody initialises is an error rather than a random value. (In public code, both PDN's centre and OSDN's
bias were overwritten by a model-wide initialiser.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

_LATER = ContextVar("initialised later", default=False)


@contextmanager
def initialised_later() -> Iterator[None]:
    """Within it `initialise` does nothing: whoever builds a model of parts sets every value once, under its full name."""
    token = _LATER.set(True)
    try:
        yield
    finally:
        _LATER.reset(token)


@torch.no_grad()
def initialise(model: nn.Module, seed: int | None = None) -> None:
    """Set every parameter of `model`. Seed None: drawn from torch's generator. A model on the meta device is left alone."""
    if _LATER.get():
        return
    owners = {name: list(module.parameters(recurse=False)) for name, module in model.named_modules()}
    if any(parameter.is_meta for own in owners.values() for parameter in own):
        return
    if seed is None:
        seed = int(torch.randint(2**62, ()).item())
    for name, module in model.named_modules():
        own = owners[name]
        if not own:
            continue
        setter = getattr(module, "initialise", None)
        assert setter is not None, f"{name} ({type(module).__name__}) owns parameters but no `initialise`"
        setter(_generator(seed, name, own[0].device))


def _generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:7], "big"))
