"""The settings of a recurrence that are no components: of queries and keys, and of the layer around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..strict import option


@dataclass(frozen=True)
class QueryKey:
    """What happens to queries and keys after their projection and short convolution."""

    activation: Literal["silu", "none", "softmax", "elu1"] = option(
        "silu", "of q and k, before they are normalised: silu | none | softmax over a head's channels | elu1: elu(x) + 1"
    )
    normalise_q: Literal["l2", "none"] = option("l2", "l2: q / sqrt(|q|^2 + 1e-6)")
    normalise_k: Literal["l2", "none"] = option("l2", "l2: k / sqrt(|k|^2 + 1e-6)")


@dataclass(frozen=True)
class Block:
    """The layer around the recurrence. Arms of one comparison share it unless it is the axis."""

    short_conv: int = option(4, "width of the causal convolution on q, k, v; 0: none", min=0, max=64)
    value_activation: Literal["silu", "none"] = option("silu", "of v, after its convolution")
    output_norm: bool = option(True, "RMSNorm per head on the output")
    output_gate: Literal["none", "silu", "sigmoid"] = option("none", "gate on the normalised output")
    output_gate_rank: int = option(0, "rank of the output gate's projection, which then has a bias; 0: full", min=0, max=65536)
    head_width: int = option(0, "key width of a head; 0: model width / heads", min=0, max=65536)
    expand_v: float = option(1.0, "value width / key width", above=0, max=64)
    key_heads: int = option(0, "heads of q and k, each shared by heads / key_heads heads; 0: as many as heads", min=0, max=4096)
    skip: bool = option(False, "add D * v to the output, D learned per head from 1 (Mamba-2)")
