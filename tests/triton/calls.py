"""The same call as its callers may make it: every way must give the same bits. Run in the interpreter by launches.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deltalab.kernels import Squash
from deltalab.kernels import triton as gpu
from deltalab.kernels.triton import launch

Function = Callable[..., tuple[Tensor, Tensor]]
Given = dict[str, Tensor | None]
H, K, V = 1, 5, 3


def functions() -> dict[str, tuple[Function, Given]]:
    """Every public function with its tensors, for two rows of a batch."""
    torch.manual_seed(0)

    def token(*more: int, T: int = 17) -> Tensor:
        return torch.rand(2, T, H, *more) / K**0.5

    keys = {"q": token(K), "read_key": token(K), "write_key": token(K), "v": token(V), "initial_state": torch.rand(2, H, K, V)}
    key, vector, number = token(K, T=6), torch.rand(2, H, K), token(T=6)
    found: dict[str, tuple[Function, Given]] = {}
    for gate, decay in (("scalar", -token()), ("channel", -token(K))):
        found[f"delta_rule, {gate}"] = (lambda **x: gpu.delta_rule(**x, scale=0.5, chunk_size=16)), {**keys, "log_decay": decay}
    found["diagonal_scan"] = gpu.diagonal_scan, {"u": key, "log_decay": -number, "initial": vector}
    found["write_key"] = (
        lambda **x: gpu.write_key(**x, squash=Squash(1.5, 1.0, "softsign", "symmetric")),
        {"key": key, "beta": number, "log_decay": -number, "gain": number, "initial": vector, "centre": torch.rand(H)},
    )
    more = {"step": number, "aware": number, "log_decay": -number, "initial": vector, "anchor": torch.rand(2, H, K)}
    box: dict[str, Any] = {"box": (0.2, 0.8), "clip_every": 1}
    found["hypergradient_scan"] = (lambda **x: gpu.hypergradient_scan(**x, **box)), {"s": key, **more}
    found["hypergradient_write_key"] = (
        lambda **x: gpu.hypergradient_write_key(**x, **box),
        {"key": key, "beta": number, **more},
    )
    return found


def run(function: Function, given: Given, weigh: Callable[[Tensor, Tensor], Tensor], learned: set[str] | None = None) -> Given:
    """Output, final state, and the gradients of weigh(output, final) in `learned`, which is everything when None."""
    tensors = {name: x for name, x in given.items() if x is not None}
    leaves = {name: x.detach().requires_grad_(learned is None or name in learned) for name, x in tensors.items()}
    o, last = function(**{**given, **leaves})
    weigh(o, last).backward()  # type: ignore[no-untyped-call]
    return {"output": o.detach(), "final": last.detach()} | {f"gradient of {name}": x.grad for name, x in leaves.items()}


def both(o: Tensor, last: Tensor) -> Tensor:
    return (o * torch.linspace(-1, 1, o.numel()).view(o.shape)).sum() + (last * 0.5).sum()


def usual(function: Function, given: Given) -> Given:
    """`run` with `both`, once for all ways: a function always comes with the same tensors."""
    if function not in _usual:
        _usual[function] = run(function, given, both)
    return _usual[function]


_usual: dict[Function, Given] = {}


def apart(x: Tensor | None) -> Tensor | None:
    """The same numbers in another order in memory."""
    return None if x is None else x.transpose(0, -1).contiguous().transpose(0, -1)


def behind_one(x: Tensor | None) -> Tensor | None:
    """The same numbers in the same order, at an address that 8 does not divide."""
    return None if x is None else torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def different(found: Given, expected: Given) -> list[str]:
    def same(a: Tensor | None, b: Tensor | None) -> bool:
        return a is b or (a is not None and b is not None and torch.equal(a, b))

    return [name for name in expected if not same(found[name], expected[name])]


def views(function: Function, given: Given) -> list[str]:
    """Tensors that are not contiguous, or begin anywhere."""
    expected = usual(function, given)
    ways = ({name: change(x) for name, x in given.items()} for change in (apart, behind_one))
    return [name for way in ways for name in different(run(function, way, both), expected)]


def expanded(function: Function, given: Given) -> list[str]:
    """Gradients without memory of their own, as a sum has them."""
    expected = run(function, given, lambda o, last: (o * torch.ones(o.shape)).sum() + (last * torch.ones(last.shape)).sum())
    return different(run(function, given, lambda o, last: o.sum() + last.sum()), expected)


def one_output(function: Function, given: Given) -> list[str]:
    """The other one has no gradient, which is one of zeros."""
    wrong = []
    for o_weight, last_weight in ((1.0, 0.0), (0.0, 1.0)):
        expected = run(function, given, lambda o, last, a=o_weight, b=last_weight: a * o.sum() + b * last.sum())
        alone = run(function, given, lambda o, last, of_output=o_weight: o.sum() if of_output else last.sum())
        wrong += different(alone, expected)
    return wrong


def one_gradient(function: Function, given: Given) -> list[str]:
    """Wanted by one tensor alone."""
    expected, wrong = usual(function, given), []
    for name in (name for name, x in given.items() if x is not None):
        found = run(function, given, both, {name})
        wrong += [n for n in different(found, expected) if n in ("output", "final", f"gradient of {name}")]
    return wrong


def autocast(function: Function, given: Given) -> list[str]:
    expected = usual(function, given)
    with torch.autocast("cpu", torch.bfloat16):
        return different(run(function, given, both), expected)


def compiled(function: Function, given: Given) -> list[str]:
    """Part of what dynamo traces, which goes around the kernels."""

    def model(**tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        o, last = function(**tensors)
        return o * 1.0, last

    expected = run(model, given, both)
    return different(run(torch.compile(model, backend="eager"), given, both), expected)


def empty(function: Function, given: Given) -> list[str]:
    """No token: the state goes through. No row: nothing."""
    wrong = []
    for name, x in given.items():
        assert x is None or name == "centre" or len(x) == 2
    tokens = {n: x if x is None or "initial" in n or n in ("anchor", "centre") else x[:, :0] for n, x in given.items()}
    found = run(function, tokens, lambda o, last: o.sum() + 3 * last.sum())
    first = next(name for name in given if "initial" in name)
    state, gradient = given[first], found[f"gradient of {first}"]
    assert state is not None and found["output"] is not None
    wrong += different({**found, "gradient": gradient}, {"final": state, "gradient": torch.full_like(state, 3.0)})
    wrong += ["shape"] if found["output"].shape[:3] != (2, 0, H) else []
    rows = {n: x if x is None or n == "centre" else x[:0] for n, x in given.items()}
    found = run(function, rows, lambda o, last: o.sum() + last.sum())
    return wrong + [name for name in ("output", "final") if len(found[name]) > 0]  # type: ignore[arg-type]


def evaluation(function: Function, given: Given) -> list[str]:
    """Without gradients, nothing is computed for them, whatever the parameters would ask for."""
    expected, launches = usual(function, given), []
    kept = launch.run

    def listen(kernel: Any, grid: Any, arguments: dict[str, Any], *more: Any, **options: Any) -> None:
        launches.append((kernel.__name__, arguments.get("KEEP", False)))
        kept(kernel, grid, arguments, *more, **options)

    launch.run = listen
    try:
        with torch.no_grad():
            o, last = function(**{name: None if x is None else x.detach().requires_grad_() for name, x in given.items()})
    finally:
        launch.run = kept
    wrong = [f"{name} keeps" for name, keeps in launches if keeps]
    return wrong + different({"output": o, "final": last}, {name: expected[name] for name in ("output", "final")})


WAYS = (views, expanded, one_output, one_gradient, autocast, compiled, empty, evaluation)
