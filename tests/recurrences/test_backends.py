"""Invariant 1 as whole layers: the chunk form is the token loop, forward and every gradient, from a carried state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from .support import every_card, mixer_of, tokens

ODD = pytest.mark.parametrize("length", [1, 63, 65, 150])


def of_card(card: str) -> Any:
    return {"card": card, "window": 70} if card == "sliding_window" else card


def differentiated(mixer: Any, x: Tensor, past: Tensor) -> list[Tensor]:
    """Output, last state, and the gradients of both for x, for the tokens before (through the state) and for every parameter."""
    leaf, before = x.clone().requires_grad_(), past.clone().requires_grad_()
    _, state = mixer(before, state=mixer.initial_state(len(x)))
    y, state = mixer(leaf, state=state)
    generator = torch.Generator().manual_seed(3)
    carried = [tensor for tensor in state.tensors() if tensor.is_floating_point()]
    upstream = [torch.randn(tensor.shape, generator=generator, dtype=torch.float64) for tensor in (y, *carried)]
    total = sum((tensor * weight).sum() for tensor, weight in zip((y, *carried), upstream, strict=True))
    assert isinstance(total, Tensor)
    gradients = torch.autograd.grad(total, [leaf, before, *mixer.parameters()])
    return [y.detach(), *(tensor.detach() for tensor in carried), *gradients]


@every_card
@ODD
def test_chunks_are_the_token_loop(card: str, length: int) -> None:
    mixer = mixer_of(of_card(card), width=6, heads=2)
    x, past = tokens(6, length, 1), tokens(6, 5, 1)
    found = []
    for backend in ("reference", "torch"):
        mixer.backend = backend
        found.append(differentiated(mixer, x, past))
    for one, other in zip(*found, strict=True):
        scale = max(1.0, one.abs().max().item())
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-10 * scale)


@every_card
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_state_that_is_handed_on_carries_its_gradient(card: str, backend: str) -> None:
    """Two calls are one long pass, in the gradients too: nothing is cut between them."""
    mixer, x = mixer_of(of_card(card), width=6, heads=2), tokens(6, 70, 1)
    mixer.backend = backend
    gradients = []
    for sizes in ([70], [66, 4], [1, 69]):
        state, outputs, leaf = mixer.initial_state(1), [], x.clone().requires_grad_()
        for piece in leaf.split(sizes, dim=1):
            y, state = mixer(piece, state=state)
            outputs.append(y)
        loss = torch.cat(outputs, dim=1).square().sum()
        gradients.append(torch.autograd.grad(loss, [leaf, *mixer.parameters()]))
    for other in gradients[1:]:
        for one, two in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-10 * max(1.0, one.abs().max().item()))


@every_card
def test_the_backends_agree_in_float32(card: str) -> None:
    mixer, x = mixer_of(of_card(card), width=8, heads=2).float(), tokens(8, 100, 1).float()
    found = []
    for backend in ("reference", "torch"):
        mixer.backend = backend
        leaf = x.clone().requires_grad_()
        y = mixer(leaf)
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, *mixer.parameters()])])
    for one, other in zip(*found, strict=True):
        assert (other - one).norm() <= 1e-4 * one.norm()
