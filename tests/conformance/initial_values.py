"""Initial values: reproducible, the same on the meta device, and out of reach of whatever initialises the whole model."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from deltalab.recurrences import Component, LanguageModel, Mixer, initialise
from deltalab.recurrences.layers import Projection

from .laboratory import Subject, mixer_of, require, require_close, sizes, tokens


def _mixer(subject: Subject, seed: int, **options: Any) -> Any:
    return mixer_of(subject, lively=False, seed=seed, **options)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(itertools.chain(module.named_parameters(), module.named_buffers()))


def check_reproducible(subject: Subject) -> None:
    """A seed gives the same finite parameters, whatever else was drawn."""
    first, again, other = _mixer(subject, 0), _mixer(subject, 0), _mixer(subject, 1)
    torch.manual_seed(5)
    disturbed = _mixer(subject, 0)
    for name, value in first.named_parameters():
        require(bool(value.isfinite().all()), f"{name}: its initial value is not finite; does `initialise` set it?")
        for one, words in ((again, "built twice"), (disturbed, "built after torch.manual_seed")):
            require(torch.equal(value, dict(one.named_parameters())[name]), f"{name}: another initial value when {words}")
    require(not torch.equal(first.in_proj.weight, other.in_proj.weight), "two seeds give the same projections")


@torch.no_grad()
def check_meta_device(subject: Subject) -> None:
    """Built on the meta device and initialised later, it is the same."""
    width, heads = sizes(subject.spec)[0]
    direct = Mixer(subject.spec, width=width, heads=heads, seed=0, short_conv=4)
    with torch.device("meta"):
        late = Mixer(subject.spec, width=width, heads=heads, seed=0, short_conv=4)
    late.to_empty(device="cpu")
    # What to_empty leaves is arbitrary, and may happen to be right: not a number cannot.
    for tensor in _tensors(late).values():
        tensor.fill_(math.nan if tensor.is_floating_point() else 0)
    initialise(late, 0)
    for name, value in direct.named_parameters():
        found = dict(late.named_parameters())[name]
        require(
            torch.equal(found, value),
            f"{name}: its initial value is lost when the model is built on the meta device; set it in `initialise`",
        )
    x = tokens(direct, 9)
    require_close(
        "output of a mixer built on the meta device (buffers are not kept there: compute them in forward)", late(x), direct(x)
    )


def _own_values(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of components that are no projection's: those with an initial value of their own."""
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, Component):
            inside = {id(p) for part in module.modules() if isinstance(part, Projection) for p in part.parameters()}
            found |= {f"{prefix}.{name}": p.detach() for name, p in module.named_parameters() if id(p) not in inside}
    return found


def _model(subject: Subject, **options: Any) -> LanguageModel:
    width, heads = sizes(subject.spec)[0]
    return LanguageModel(subject.spec, vocab=11, width=width, layers=1, heads=heads, **options)


def check_whole_model(subject: Subject) -> None:
    """Initial values survive what initialises the whole model.

    Whatever its `init_std`, a component's own initial values are those of the component alone.
    """
    one, wide, other = _model(subject, seed=0), _model(subject, seed=0, init_std=0.5), _model(subject, seed=1)
    alone = _own_values(Mixer(subject.spec, *sizes(subject.spec)[0], seed=0))
    for name, value in _own_values(one).items():
        require(torch.equal(value, _own_values(wide)[name]), f"{name}: depends on the model's init_std")
        # A value that is the same for two seeds is a documented number, and must be the one of the component alone.
        short = name.removeprefix("blocks.0.mixer.")
        if torch.equal(value, _own_values(other)[name]):
            require(
                torch.equal(value, alone[short]),
                f"{name}: {value.flatten()[0]:g} in a model, {alone[short].flatten()[0]:g} alone",
            )


def check_weight_decay(subject: Subject) -> None:
    """No component's parameter is decayed by the optimiser."""
    model = _model(subject, seed=0)
    decayed, kept = model.decay_groups()
    names = {id(p): name for name, p in model.named_parameters()}
    ids = [id(p) for p in (*decayed, *kept)]
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    require(len(ids) == len(set(ids)) and set(ids) == trained, "a parameter is in both groups of the optimiser, or in none")
    for module in model.modules():
        for parameter in module.parameters() if isinstance(module, Component) else ():
            require(id(parameter) not in {id(p) for p in decayed}, f"{names[id(parameter)]}: a component's parameter is decayed")


CHECKS = (check_reproducible, check_meta_device, check_whole_model, check_weight_decay)
