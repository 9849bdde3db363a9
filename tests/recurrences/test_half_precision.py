"""Under autocast, before a backend that takes 16-bit operands: what goes in as it was projected, and what stays float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deltalab import registry
from deltalab.kernels import chunked, first_use, triton
from deltalab.recurrences import Mixer


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.dtype | None]:
    """The chunk form passes for the GPU's kernels; the dtypes that it was handed."""
    found: dict[str, torch.dtype | None] = {}

    def kernels(q: Tensor, r: Any, w: Tensor, v: Tensor, g: Any, first: Any, scale: float, *more: Any) -> Any:
        given = {"q": q, "r": r, "w": w, "v": v, "g": g, "first": first}
        found.update({name: None if x is None else x.dtype for name, x in given.items()})
        o, last = chunked.delta_rule(*(None if x is None else x.float() for x in given.values()), scale, 64, torch.float32)
        return o.to(v.dtype), last

    monkeypatch.setattr(triton, "available", lambda device: True)
    monkeypatch.setattr(triton, "delta_rule", kernels)
    monkeypatch.setattr(first_use, "holds", lambda *call: True)
    monkeypatch.setattr(first_use, "layers_hold", lambda device: False)
    return found


def spied(mixer: Mixer, monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes in which its convolution hands on q, k and v."""
    heads, found = mixer.conv.heads, []

    def spy(*given: Any) -> Any:
        parts, state = heads(*given)
        found.extend(part.dtype for part in parts)
        return parts, state

    monkeypatch.setattr(mixer.conv, "heads", spy)
    return found


@pytest.mark.parametrize(
    ("card", "straight"),
    [("gdn", True), ("kda", True), ("mamba2", True), ("deltanet", True), ("kla", False), ("comba", False), ("static_dn", False)],
)
def test_only_what_a_kernel_reads_is_narrow(card, straight, seen, monkeypatch):
    spec = registry.load({"card": "deltanet", "preconditioner": "static"} if card == "static_dn" else card)
    mixer = Mixer(spec, width=32, heads=2, backend="triton", seed=0)
    x = torch.randn(2, 9, 32)
    wanted = mixer(x)
    assert seen["q"] == torch.float32
    handed = spied(mixer, monkeypatch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(x)
    assert set(handed) == {torch.bfloat16 if straight else torch.float32}
    assert {seen[name] for name in "qwv"} == {torch.bfloat16}
    assert seen["g"] in (None, torch.float32)
    torch.testing.assert_close(y.float(), wanted, rtol=0.1, atol=0.1 * wanted.abs().max().item())
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 and bool(p.grad.isfinite().all()) for p in mixer.parameters())


def test_somebody_who_watches_sees_float32(seen, monkeypatch):
    mixer = Mixer(registry.load("gdn"), width=32, heads=2, backend="triton", seed=0)
    handed, observed = spied(mixer, monkeypatch), []
    mixer.observer = observed.append
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixer(torch.randn(2, 9, 32))
    assert set(handed) == {observed[0].write_key.dtype, observed[0].value.dtype} == {torch.float32}


def test_the_chunk_form_is_handed_float32(monkeypatch):
    mixer = Mixer(registry.load("gdn"), width=32, heads=2, backend="torch", seed=0)
    handed = spied(mixer, monkeypatch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixer(torch.randn(2, 9, 32))
    assert set(handed) == {torch.float32}


def test_a_state_goes_on_in_float32(seen):
    mixer = Mixer(registry.load("gdn"), width=32, heads=2, backend="triton", seed=0)
    x = torch.randn(2, 12, 32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        whole, _ = mixer(x, state=mixer.initial_state(2))
        first, state = mixer(x[:, :7], state=mixer.initial_state(2))
        rest, state = mixer(x[:, 7:], state=state)
    assert state.memory.dtype == torch.float32
    torch.testing.assert_close(torch.cat([first, rest], dim=1), whole, rtol=0.05, atol=0.02)
