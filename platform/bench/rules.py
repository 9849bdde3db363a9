"""The rules that one kernel serves, as `deltalab bench kernels` calls them: their inputs, our call, the truth in float64.

    S~ = Diag(a) S    e = v - S~^T k    S' = S~ + w e^T    o = K^-1/2 S'^T q          (e = v without erase)

A rule chooses the gate a (none | one number per head | one per key channel), whether it erases, and the write key w: beta k; beta
times a key of its own; or beta m k with a preconditioner's m, which is part of what is timed.

B batch, T time, H heads, K key width, V value width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import UserError, unknown
from ...kernels import Squash, delta_rule, hypergradient_write_key, preconditioned_write_key

GATES = ("none", "scalar", "channel")
PRECONDITIONERS = ("none", "diagonal", "hypergradient")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Inputs = dict[str, Tensor]
"""Name -> tensor: q, k, v, beta and what else the rule takes."""
_NAMES = {
    (True, "none"): ("deltanet", "gdn", "kda"),
    (True, "diagonal"): ("pdn", "pgdn", "pkda"),
    (True, "hypergradient"): ("osdn", "osgdn", "oskda"),
    (False, "none"): ("linear attention", "scalar gate", "gla"),
}


@dataclass(frozen=True)
class Case:
    """One shape: B sequences of T tokens, H heads of K x V."""

    B: int
    T: int
    H: int
    K: int
    V: int

    def __str__(self) -> str:
        return f"{self.B} x {self.T} x {self.H}, {self.K} x {self.V}"


@dataclass(frozen=True)
class Rule:
    """One choice per axis. Errors: `UserError` that names the option."""

    gate: str = "scalar"
    erase: bool = True
    separate: bool = False
    """The write key is beta times a key of its own."""
    preconditioner: str = "none"

    def __post_init__(self) -> None:
        if self.gate not in GATES:
            raise unknown("gate", self.gate, GATES, "--gate")
        if self.preconditioner not in PRECONDITIONERS:
            raise unknown("preconditioner", self.preconditioner, PRECONDITIONERS, "--preconditioner")
        if self.separate and self.preconditioner != "none":
            raise UserError(
                f"--separate-keys: a preconditioner ({self.preconditioner}) makes the write key; valid beside it is --gate alone"
            )
        if not self.erase and self.preconditioner != "none":
            raise UserError(
                f"--no-erase: a preconditioner ({self.preconditioner}) is of the delta rule; valid beside it is --erase"
            )

    @property
    def name(self) -> str:
        """The card's name, where one is this rule."""
        known = _NAMES[self.erase, self.preconditioner][GATES.index(self.gate)]
        return f"{known} 2 keys" if self.separate else known

    @property
    def scan(self) -> dict[str, Any]:
        """The hypergradient's options on the card: `osdn` without a gate, `osgdn` and `oskda` with one."""
        if self.gate == "none":
            return {"step": 1.0, "box": (0.0, math.inf)}
        return {"step": 0.003, "box": (2 / 3, 3 / 2)}


GDN = Rule()
FAMILY = (
    GDN,
    *(Rule("scalar", preconditioner=name) for name in PRECONDITIONERS[1:]),
    Rule("scalar", separate=True),
    Rule("scalar", erase=False),
    *(Rule(gate, preconditioner=name) for gate in ("none", "channel") for name in PRECONDITIONERS),
)
"""GDN first: the others are held against it."""


def draw(rule: Rule, case: Case, seed: int, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Inputs, Tensor]:
    """The rule's inputs, all leaves, and the gradient of the output. q, k, v and beta are of `dtype`; decays and what a scan
    starts from are float32, as layers keep them. Keys have norm 1."""
    generator = torch.Generator(device).manual_seed(seed)
    tokens = (case.B, case.T, case.H)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    found = {
        "q": normal(*tokens, case.K),
        "k": F.normalize(normal(*tokens, case.K), dim=-1),
        "v": normal(*tokens, case.V),
        "beta": torch.sigmoid(normal(*tokens)),
    }
    if rule.gate != "none":
        found["log_decay"] = -torch.exp(normal(*tokens, *([case.K] if rule.gate == "channel" else [])) - 3)
    if rule.separate:
        found["write"] = F.normalize(normal(*tokens, case.K), dim=-1)
    if rule.preconditioner == "diagonal":
        found["gain"] = torch.sigmoid(normal(*tokens))
        found["forget"] = -torch.exp(normal(*tokens) - 3)
        found["centre"] = torch.full((case.H,), -0.2)
    if rule.preconditioner == "hypergradient":
        found["first"] = torch.full((case.B, case.H, case.K), 0.0 if rule.gate == "none" else 1.0)
    low = {"q", "k", "v", "beta", "write", "gain"}
    inputs = {name: x.to(device, dtype if name in low else torch.float32).requires_grad_() for name, x in found.items()}
    return inputs, normal(*tokens, case.V).to(device, dtype)


def write_key(rule: Rule, x: Inputs, backend: str, statistic: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
    """(w [B,T,H,K], or None where it is beta k; the scan's last statistic [B,H,K])."""
    k, beta = x["k"], x["beta"]
    if rule.separate:
        return beta[..., None] * x["write"], None
    if rule.preconditioner == "diagonal":
        return preconditioned_write_key(
            k, x["centre"], Squash(), beta, x["forget"], x["gain"], initial=statistic, backend=backend
        )
    if rule.preconditioner == "hypergradient":
        aware = None if rule.gate == "none" else beta
        first = x["first"] if statistic is None else statistic
        return hypergradient_write_key(k, beta=beta, aware=aware, initial=first, clip="token", backend=backend, **rule.scan)
    return None, None


def ours(rule: Rule, x: Inputs, backend: str) -> Tensor:
    """o by a backend of ours, called as the mixer calls it: with beta where the key that reads is the one that writes."""
    w, _ = write_key(rule, x, backend)
    beta = x["beta"] if w is None else None
    read = x["k"] if rule.erase or w is None else None
    o, _ = delta_rule(x["q"], read, w, x["v"], x.get("log_decay"), erase=rule.erase, backend=backend, beta=beta)
    return o


def truth(rule: Rule, inputs: Inputs, upstream: Tensor, normalises: bool = False) -> list[Tensor]:
    """Output and every input's gradient in float64, by the chunk form, which shares no loop with the other backends.
    `normalises`: of a function that divides q and k by their norms first."""
    leaves = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    given = dict(leaves)
    if normalises:
        given.update({name: F.normalize(leaves[name], dim=-1) for name in ("q", "k")})
    o = ours(rule, given, "torch")
    torch.autograd.backward(o, upstream.double())
    return [o.detach(), *[x.grad for x in leaves.values() if x.grad is not None]]
