"""Rows of several documents: each is read as if it stood alone, by every recurrence, in values and gradients."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from deltalab import registry
from deltalab.recurrences import LanguageModel
from deltalab.recurrences.documents import read_by_document


def model_of(card: str) -> LanguageModel:
    return LanguageModel(registry.load(card), vocab=32, width=16, layers=2, heads=2, seed=0).double()


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 32, (3, 37), generator=generator)
    starts = torch.rand(3, 37, generator=generator) < 0.15
    starts[1] = False  # a row of one document
    starts[2, 5:9] = True  # documents of one token
    return tokens, starts


@pytest.mark.parametrize("card", ["gdn", "kda", "osdn", "pgdn", "rls", "deltaproduct", "softmax", "gdn softmax", "longhorn"])
def test_every_document_is_read_alone(card: str) -> None:
    model = model_of(card)
    tokens, starts = rows()
    found, _ = model.hidden(tokens, starts=starts)
    for row in range(3):
        edges = [0, *[t for t in range(1, 37) if starts[row, t]], 37]
        for first, last in pairwise(edges):
            alone, _ = model.hidden(tokens[row : row + 1, first:last])
            torch.testing.assert_close(found[row : row + 1, first:last], alone, rtol=1e-9, atol=1e-9)
    joined, _ = model.hidden(tokens)
    assert not torch.allclose(found[0], joined[0], atol=1e-4)  # it matters


def test_gradients_are_those_of_the_documents() -> None:
    tokens, starts = rows()
    targets = torch.randint(0, 32, (3, 37), generator=torch.Generator().manual_seed(1))
    together = model_of("pgdn")
    together.loss(tokens, targets, starts).backward()
    apart = model_of("pgdn")
    total = torch.zeros((), dtype=torch.float64)
    for row in range(3):
        edges = [0, *[t for t in range(1, 37) if starts[row, t]], 37]
        for first, last in pairwise(edges):
            part = slice(first, last)
            total = total + (last - first) * apart.loss(tokens[row : row + 1, part], targets[row : row + 1, part])
    (total / tokens.numel()).backward()
    for (name, one), other in zip(together.named_parameters(), apart.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None, name
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-10)


def test_little_is_read_in_vain() -> None:
    """Less than twice the tokens, and every token once."""
    tokens, starts = rows()
    read: list[int] = []

    def count(part: torch.Tensor) -> torch.Tensor:
        read.append(part.numel())
        return part[..., None].double()

    assert torch.equal(read_by_document(count, tokens, starts)[..., 0], tokens.double())
    assert tokens.numel() <= sum(read) < 2 * tokens.numel()
