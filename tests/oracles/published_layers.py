"""The layers of the cards from their published equations, around a naive form of flash-linear-attention.

Plain torch from the parameters of a mixer (`mixer.named_parameters()`), none of the project's code: projection, causal
convolution, SiLU, normalisation, gate, step size, the naive operator, RMSNorm, output gate, projection.

B batch, T time, H heads, K key width, V value width, D model width, n substeps of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .agreement import Tensors
from .fla_naive import naive


@dataclass(frozen=True)
class Layer:
    """A layer's input and parameters, and what every card makes of them."""

    z: Tensors
    """`x` [B,T,D] and the parameters by the mixer's names."""
    heads: int
    key: int
    value: int
    substeps: int = 1
    key_heads: int = 0
    """Heads of q and k, each shared by `heads` / `key_heads` heads; 0: one for each."""
    sigmoid_gate: bool = False
    """The output gate is a sigmoid of a low rank instead of SiLU."""

    def projected(self) -> tuple[Tensor, Tensor, Tensor]:
        """x -> q [B,T,G,K], k [B,T*n,G,K], v [B,T*n,H,V] after the causal convolution; G heads of q and k."""
        mixed = linear(self.z, "in_proj", self.z["x"])
        if "conv.weight" in self.z:
            mixed = convolved(mixed, self.z["conv.weight"])
        G, H, K, V, n = self.key_heads or self.heads, self.heads, self.key, self.value, self.substeps
        q, k, v = mixed.split([G * K, n * G * K, n * H * V], dim=-1)
        q, k = (part.unflatten(-1, (-1, G, K)).flatten(1, 2) for part in (q, k))
        return q, k, v.unflatten(-1, (n, H, V)).flatten(1, 2)

    def qkv(self, activation: Callable[[Tensor], Tensor] = F.silu) -> tuple[Tensor, Tensor, Tensor]:
        """q [B,T,H,K], k [B,T*n,H,K], v [B,T*n,H,V]; `activation` of q and k, SiLU of v."""
        q, k, v = self.projected()
        q, k = (activation(part).repeat_interleave(self.heads // part.shape[2], dim=2) for part in (q, k))
        return q, k, F.silu(v)

    def unit_qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """As `qkv`, with q and k of length 1."""
        q, k, v = self.qkv()
        return unit(q), unit(k), v

    def beta(self, largest: float = 1.0) -> Tensor:
        """sigmoid(W x), [B,T*n,H]: one projection per substep."""
        names = ["step_size.proj", *(f"later_steps.{j}.proj" for j in range(self.substeps - 1))]
        steps = [largest * torch.sigmoid(linear(self.z, name, self.z["x"])) for name in names]
        return torch.stack(steps, dim=2).flatten(1, 2)

    def head_law(self, axis: str) -> tuple[Tensor, Tensor]:
        """(-exp(A_log) dt, dt) with dt = softplus(W x + dt_bias), both [B,T,H]; `axis` is "gate" or "forgetting"."""
        dt = F.softplus(linear(self.z, f"{axis}.proj", self.z["x"]) + self.z[f"{axis}.dt_bias"])
        return -self.z[f"{axis}.A_log"].exp() * dt, dt

    def low_rank(self, axis: str) -> Tensor:
        """W_up W_down x per head and channel, [B,T,H,K]."""
        return linear(self.z, f"{axis}.up", linear(self.z, f"{axis}.down", self.z["x"])).unflatten(-1, (self.heads, -1))

    def channel_law(self) -> Tensor:
        """-exp(A_log) softplus(W_up W_down x + dt_bias), [B,T,H,K]."""
        z = self.low_rank("gate") + self.z["gate.dt_bias"].view(self.heads, -1)
        return -self.z["gate.A_log"].exp()[:, None] * F.softplus(z)

    def no_decay(self) -> Tensor:
        """log 1 for every head, [B,T,H]."""
        return self.z["x"].new_zeros(*self.z["x"].shape[:2], self.heads)

    def output(self, o: Tensor) -> Tensor:
        """RMSNorm per head, output gate where there is one, projection: o [B,T,H,V] -> [B,T,D]."""
        o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-5) * self.z["norm.weight"]
        o = o.flatten(-2)
        if self.sigmoid_gate:
            o = o * torch.sigmoid(linear(self.z, "gate_proj.1", linear(self.z, "gate_proj.0", self.z["x"])))
        elif "gate_proj.weight" in self.z:
            o = o * F.silu(linear(self.z, "gate_proj", self.z["x"]))
        return linear(self.z, "out_proj", o)


def linear(z: Tensors, name: str, x: Tensor) -> Tensor:
    """W x (+ b)."""
    return F.linear(x, z[f"{name}.weight"], z.get(f"{name}.bias"))


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    """y_t = sum_i w_i * x_{t-i}, causal and per channel: x [B,T,C], w [W,C]."""
    past = F.pad(x, (0, 0, len(weight) - 1, 0))
    return sum((w * past[:, len(weight) - 1 - i :][:, : x.shape[1]] for i, w in enumerate(weight)), torch.zeros_like(x))


def unit(x: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + 1e-6)."""
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def as_it_is(x: Tensor) -> Tensor:
    return x


def elu1(x: Tensor) -> Tensor:
    """elu(x) + 1, the positive features of linear attention."""
    return F.elu(x) + 1


def linear_attention(c: Layer) -> Tensor:
    q, k, v = c.qkv(activation=elu1)
    return naive("simple_gla")(q=q, k=k, v=v, g=c.no_decay())[0]


def retnet(c: Layer) -> Tensor:
    """q and k as they are projected: neither rotated nor activated."""
    q, k, v = (part.transpose(1, 2) for part in c.qkv(activation=as_it_is))
    return naive("retention")(q=q, k=k, v=v).transpose(1, 2)


def mamba2(c: Layer) -> Tensor:
    """S_t = a_t S_{t-1} + dt_t k_t v_t^T, and D v beside it."""
    q, k, v = c.qkv()
    log_decay, dt = c.head_law("gate")
    o = naive("simple_gla")(q=q, k=dt[..., None] * k, v=v, g=log_decay)[0]
    return o + c.z["skip.D"][:, None] * v


def gla(c: Layer) -> Tensor:
    """log a = logsigmoid(W_up W_down x + b) / 16 per channel."""
    q, k, v = c.qkv(activation=as_it_is)
    return naive("gla")(q=q, k=k, v=v, gk=F.logsigmoid(c.low_rank("gate")) / 16)[0]


def longhorn(c: Layer) -> Tensor:
    """S_t = (1 - D k^2) S_{t-1} + D k v^T with D = beta / (1 + beta |k|^2), the gate taken in float64."""
    q, k, v = c.qkv()
    beta, key = c.beta()[..., None].double(), k.double()
    step = beta / (1 + beta * key.square().sum(-1, keepdim=True))
    return naive("gla")(q=q, k=(step * key).float(), v=v, gk=torch.log(1 - step * key * key).float())[0]


def deltanet(c: Layer) -> Tensor:
    q, k, v, beta = (part.transpose(1, 2) for part in (*c.unit_qkv(), c.beta()))
    return naive("delta_rule")(q=q, k=k, v=v, beta=beta)[0].transpose(1, 2)


def gdn(c: Layer) -> Tensor:
    q, k, v = c.unit_qkv()
    return naive("gated_delta_rule")(q=q, k=k, v=v, beta=c.beta(), g=c.head_law("gate")[0])[0]


def kda(c: Layer) -> Tensor:
    q, k, v = c.unit_qkv()
    return naive("kda")(q=q, k=k, v=v, beta=c.beta(), g=c.channel_law())[0]


def _statistic(c: Layer) -> dict[str, Tensor]:
    """How the diagonal statistic forgets and what a token adds, and its centre: the naive forms' own names."""
    gain = torch.sigmoid(linear(c.z, "forgetting.gain", c.z["x"]))
    return {"g_atk": c.head_law("forgetting")[0], "beta_atk": gain, "log_atk_scale": c.z["preconditioner.centre"]}


def pdn(c: Layer) -> Tensor:
    q, k, v = c.qkv()
    return naive("precond_gated_delta_rule")(q=q, k=k, v=v, beta=c.beta(), g=c.no_decay(), **_statistic(c))[0]


def pgdn(c: Layer) -> Tensor:
    """The naive form normalises q and k itself (without 1e-6 under the root)."""
    q, k, v = c.qkv()
    return naive("precond_gated_delta_rule")(q=q, k=k, v=v, beta=c.beta(), g=c.head_law("gate")[0], **_statistic(c))[0]


def pkda(c: Layer) -> Tensor:
    q, k, v = c.unit_qkv()
    return naive("precond_kda")(q=q, k=k, v=v, beta=c.beta(), g=c.channel_law(), **_statistic(c))[0]


def comba(c: Layer) -> Tensor:
    """p k is read before writing, p = sigmoid(c); the query is corrected by D p k."""
    q, k, v = c.unit_qkv()
    read = torch.sigmoid(c.z["erase.c"])[:, None] * k
    corrected = q - c.z["feedback.D"][:, None] * read
    return naive("comba")(q=corrected, k=k, v=v, p=read, beta=c.beta(), g=c.head_law("gate")[0])[0]


def deltaproduct(c: Layer) -> Tensor:
    """n steps a token, each as far as 2."""
    q, k, v = c.unit_qkv()
    given = {"beta": c.beta(largest=2.0), "g": None, "scale": c.key**-0.5, "num_householder": c.substeps}
    return naive("gated_delta_product")(q=q, k=k, v=v, **given)[0]


def gated_deltaproduct(c: Layer) -> Tensor:
    q, k, v = c.unit_qkv()
    given = {"beta": c.beta(largest=2.0), "g": c.head_law("gate")[0], "scale": c.key**-0.5, "num_householder": c.substeps}
    return naive("gated_delta_product")(q=q, k=k, v=v, **given)[0]


def gdn2(c: Layer) -> Tensor:
    """b * k is read before writing and w * v is written, b and w per channel."""
    q, k, v = c.unit_qkv()
    b, w = (torch.sigmoid(linear(c.z, f"{axis}.proj", c.z["x"])).unflatten(-1, (c.heads, -1)) for axis in ("erase", "value_gain"))
    return naive("gdn2")(q=q, k=k, v=v, b=b, w=w, g=c.channel_law())[0]


def mesanet(c: Layer) -> Tensor:
    """C_t^T (G_t + Lambda)^-1 q_t, Lambda = 0.25 + softplus(l); log a = logsigmoid(W x + b).

    The naive form has no K^-1/2; here every card has it. The norm removes it but for its 1e-5.
    """
    q, k, v = c.unit_qkv()
    ridge = 0.25 + F.softplus(c.z["preconditioner.ridge"])
    log_decay = F.logsigmoid(linear(c.z, "gate.proj", c.z["x"]))
    return c.key**-0.5 * naive("mesa_net")(q=q, k=k, v=v, g=log_decay, beta=c.beta(), lamb=ridge)[0]


OPERATORS: dict[str, Callable[[Layer], Tensor]] = {
    function.__name__: function
    for function in (
        linear_attention,
        retnet,
        mamba2,
        gla,
        longhorn,
        deltanet,
        gdn,
        kda,
        pdn,
        pgdn,
        pkda,
        comba,
        deltaproduct,
        gated_deltaproduct,
        gdn2,
        mesanet,
    )
}
"""Card -> the naive operator's output o [B,T,H,V] for its layer."""
