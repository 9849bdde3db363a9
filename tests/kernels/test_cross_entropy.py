"""Cross entropy in slices against the definition: loss and both gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from deltalab.kernels.cross_entropy import linear_cross_entropy


@pytest.mark.parametrize("numbers", [1, 30, 31, 300, 10**6])
@pytest.mark.parametrize("n", [1, 7, 64])
def test_slices_are_the_whole(n: int, numbers: int) -> None:
    hidden, weight = (torch.randn(shape, 5, dtype=torch.float64, requires_grad=True) for shape in (n, 30))
    targets = torch.randint(0, 30, (n,))
    found, expected = linear_cross_entropy(hidden, weight, targets, numbers), F.cross_entropy(hidden @ weight.t(), targets)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    ours, theirs = (torch.autograd.grad(loss * 3, (hidden, weight)) for loss in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_gradients_against_finite_differences() -> None:
    hidden, weight = (torch.randn(shape, 3, dtype=torch.float64, requires_grad=True) for shape in (5, 6))
    targets = torch.randint(0, 6, (5,))
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets, 12), (hidden, weight))


def test_nothing_is_kept_where_nothing_is_differentiated() -> None:
    hidden, weight, targets = torch.randn(5, 3), torch.randn(6, 3, requires_grad=True), torch.randint(0, 6, (5,))
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.t(), targets))
    linear_cross_entropy(hidden, weight, targets).backward()
    assert weight.grad is not None and hidden.grad is None


def test_under_autocast() -> None:
    """Products in bfloat16, exponentials and sums in float32."""
    hidden, weight = (torch.randn(shape, 32, requires_grad=True) for shape in (100, 40))
    targets = torch.randint(0, 40, (100,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, 1000)
    assert loss.dtype == torch.float32
    expected = F.cross_entropy(hidden @ weight.t(), targets)
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    for one, other in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        assert one.dtype == torch.float32 and (one - other).norm() < 0.02 * other.norm()


def test_no_row_gives_nan() -> None:
    assert torch.isnan(linear_cross_entropy(torch.randn(0, 3), torch.randn(4, 3), torch.zeros(0, dtype=torch.int64)))
