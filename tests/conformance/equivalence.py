"""One function however it is computed: chunk by chunk or token by token, alone or in a batch, at once or with a state."""

from __future__ import annotations

import contextlib
import dataclasses
import io

import torch
from torch import Tensor

from deltalab.errors import UserError
from deltalab.kernels import backends, resolve_backend
from deltalab.recurrences import Mixer, MixerState

from .laboratory import (
    CARRIED,
    LONG,
    Subject,
    loss_of,
    mixer_of,
    named_tensors,
    require,
    require_close,
    sizes,
    stream,
    tokens,
)


def check_sizes(subject: Subject) -> None:
    """Builds at odd widths, with one head, without a short convolution."""
    for size in sizes(subject.spec):
        for short_conv in (4, 1, 0):
            mixer = mixer_of(subject, size=size, short_conv=short_conv)
            x = tokens(mixer, 5)
            y = mixer(x)
            where = f"width {size[0]}, {size[1]} heads, short_conv {short_conv}"
            require(y.shape == x.shape, f"{where}: output of shape {tuple(y.shape)}, expected {tuple(x.shape)}")
            require(bool(y.isfinite().all()), f"{where}: the output holds numbers that are not finite")


def _outcome(mixer: Mixer, x: Tensor, state: MixerState) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(output and new state, gradients of parameters, input and old state)."""
    x = x.clone().requires_grad_()
    carried = {name: t.detach().clone().requires_grad_(t.is_floating_point()) for name, t in named_tensors(state).items()}
    y, new = mixer(x, state=dataclasses.replace(state, **carried))
    results = {"output": y, **{f"state.{name}": t for name, t in named_tensors(new).items()}}
    inputs = {
        "x": x,
        **{f"state.{name}": t for name, t in carried.items() if t.requires_grad and t.numel()},
        **{name: p for name, p in mixer.named_parameters() if p.requires_grad},
    }
    gradients = torch.autograd.grad(loss_of(results), list(inputs.values()), allow_unused=True)
    return results, {name: torch.zeros_like(inputs[name]) if g is None else g for name, g in zip(inputs, gradients, strict=True)}


def check_chunks(subject: Subject) -> None:
    """The chunk form equals the token loop, in every gradient; so do all backends.

    Output, final state and all gradients, 70 tokens from a state that is not empty.
    """
    loop = mixer_of(subject, backend="reference")
    x = tokens(loop, LONG)
    with torch.no_grad():
        _, state = loop(tokens(loop, 5, seed=7), state=loop.initial_state(len(x)))
    expected = _outcome(loop, x, state)
    for backend in _backends():
        found = _outcome(mixer_of(subject, backend=backend), x, state)
        for kind, left, right in zip(("", "gradient of "), found, expected, strict=True):
            for name, value in right.items():
                require_close(f"{kind}{name}, backend {backend} against reference", left[name], value)


def _backends() -> list[str]:
    """Those of this installation that work on the CPU, beside the reference."""
    found = []
    for backend in backends():
        with contextlib.suppress(UserError):
            found.append(resolve_backend(backend, "cpu"))
    return [backend for backend in found if backend != "reference"]


@torch.no_grad()
def check_causality(subject: Subject) -> None:
    """What comes later changes nothing before it."""
    mixer = mixer_of(subject)
    x = tokens(mixer, LONG)
    y = mixer(x)
    for t in (1, 7, 33, 64, LONG - 1):
        changed = x.clone()
        changed[:, t:] = 3 * tokens(mixer, LONG - t, seed=11)
        difference = (mixer(changed)[:, :t] - y[:, :t]).abs().amax(dim=(0, 2))
        seen = (difference > 1e-10 * max(1.0, float(y.abs().max()))).nonzero().flatten().tolist()
        require(not seen, f"the output of token {seen[0] if seen else 0} depends on tokens from {t} on, which come later")


@torch.no_grad()
def check_batch(subject: Subject) -> None:
    """A sequence does not depend on the others of its batch."""
    mixer = mixer_of(subject)
    x = tokens(mixer, 20, batch=3)
    together, states = mixer(x, state=mixer.initial_state(3))
    for i in range(3):
        alone, state = mixer(x[i : i + 1], state=mixer.initial_state(1))
        require_close(f"output of sequence {i} alone against in a batch of 3", alone, together[i : i + 1])
        for name, tensor in named_tensors(state).items():
            require_close(f"state.{name} of sequence {i} alone", tensor, named_tensors(states)[name][i : i + 1])


@torch.no_grad()
def check_streaming(subject: Subject) -> None:
    """Prefill, then token by token, is one pass; so is the final state."""
    mixer = mixer_of(subject)
    x = tokens(mixer, 11)
    whole, last = mixer(x, state=mixer.initial_state(len(x)))
    require_close("output with a state against without one", whole, mixer(x), CARRIED)
    for prefill in (0, 1, 6):
        y, state = stream(mixer, x, prefill)
        words = f"prefill of {prefill}, then token by token"
        require_close(f"{words}: output against one pass", y, whole, CARRIED)
        for name, tensor in named_tensors(state).items():
            require_close(f"{words}: state.{name} against one pass", tensor, named_tensors(last)[name], CARRIED)


@torch.no_grad()
def check_state(subject: Subject) -> None:
    """The state's size is exact; it is never changed; it can be saved.

    `state_bytes` says its size; a call leaves the state that it was given alone; loaded again, it goes on the same.
    """
    for mixer in (mixer_of(subject).float(), mixer_of(subject)):
        x = tokens(mixer, 9)
        start = mixer.initial_state(len(x))
        _require_bytes(mixer, start, 0)
        _, state = mixer(x[:, :6], state=start)
        _require_bytes(mixer, state, 6)
    before = {name: tensor.clone() for name, tensor in named_tensors(state).items()}
    expected, _ = mixer(x[:, 6:], state=state)
    for name, tensor in named_tensors(state).items():
        require(torch.equal(tensor, before[name]), f"state.{name} was changed in place by a call that was given it")
    file = io.BytesIO()
    torch.save(named_tensors(state), file)
    file.seek(0)
    again, _ = mixer(x[:, 6:], state=MixerState(**torch.load(file)))
    require(torch.equal(again, expected), "the output after saving and loading the state is another one")


def _require_bytes(mixer: Mixer, state: MixerState, length: int) -> None:
    said, batch = mixer.state_bytes(length), 2
    words = f"state_bytes says {said} for a sequence, but the state of {batch} holds {state.state_bytes} bytes"
    held = ", ".join(f"{name} {tensor.dtype}".replace("torch.", "") for name, tensor in named_tensors(state).items())
    require(state.state_bytes == batch * said, f"{words} ({mixer.in_proj.weight.dtype} model: {held})")


CHECKS = (check_sizes, check_chunks, check_causality, check_batch, check_streaming, check_state)
