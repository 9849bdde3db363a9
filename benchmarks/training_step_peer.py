"""The model of `training_step.py` as a user of transformers would build it: its Qwen3-Next gated delta layers, torch's own norms,
linear layers, loss, clipping and fused AdamW."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltalab.platform.tasks import Split
from deltalab.platform.training import Hardware
from deltalab.recurrences import LanguageModel

HEAD = 64


def layer_class() -> Any:
    """Qwen3NextGatedDeltaNet with its plain PyTorch functions: with flash-linear-attention installed they are bound to GPU
    code."""
    from transformers.models.qwen3_next import modeling_qwen3_next as module

    for name in ("torch_chunk_gated_delta_rule", "causal_conv1d_fn"):
        setattr(module, name, inspect.unwrap(getattr(module, name)))
    return module.Qwen3NextGatedDeltaNet


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(width, 2 * hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        y: Tensor = self.down(F.silu(gate) * up)
        return y


class Peer(nn.Module):
    """tokens [B,T] -> logits [B,T,N], with as many parameters as ours."""

    def __init__(self, vocab: int, width: int, layers: int, heads: int, hidden: int) -> None:
        super().__init__()
        from transformers import Qwen3NextConfig

        config = Qwen3NextConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            linear_num_value_heads=heads,
            linear_num_key_heads=heads,
            linear_key_head_dim=HEAD,
            linear_value_head_dim=HEAD,
            rms_norm_eps=1e-5,
            use_cache=False,
        )
        layer = layer_class()
        self.embedding = nn.Embedding(vocab, width)
        self.mixers = nn.ModuleList(layer(config, 0) for _ in range(layers))
        self.mlps = nn.ModuleList(MLP(width, hidden) for _ in range(layers))
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-5) for _ in range(2 * layers + 1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for i, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps, strict=True)):
            x = x + mixer(self.norms[2 * i](x))
            x = x + mlp(self.norms[2 * i + 1](x))
        return F.linear(self.norms[-1](x), self.embedding.weight)

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def training_step(self, split: Split, batch: int, hardware: Hardware) -> Callable[[], float]:
        """A step as most training scripts have it."""
        optimiser = torch.optim.AdamW(self.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        count = 0

        def step() -> float:
            nonlocal count
            inputs, targets = split.rows(np.arange(batch) + count)
            count += 1
            with hardware.autocast():
                logits = self(torch.from_numpy(inputs))
                loss = F.cross_entropy(logits.flatten(0, 1).float(), torch.from_numpy(targets).flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            return float(loss.detach())

        return step


@torch.no_grad()
def copy_weights(ours: LanguageModel, peer: Peer) -> None:
    """Give the peer our values, so that both compute the same logits: a ratio of two models that are not the same says little."""
    peer.embedding.weight.copy_(ours.embedding.weight)
    peer.norms[-1].weight.copy_(ours.norm.weight)
    for i, block in enumerate(ours.blocks):
        mixer, theirs = block.mixer, peer.mixers[i]
        heads = mixer.shape.heads
        # Theirs are laid out head by head: q, k, v, z of one head, then of the next; and beta, gate likewise.
        wide = torch.cat([mixer.in_proj.weight, mixer.gate_proj.weight]).unflatten(0, (4, heads, HEAD))
        theirs.in_proj_qkvz.weight.copy_(wide.transpose(0, 1).flatten(0, 2))
        narrow = torch.stack([mixer.step_size.proj.weight, mixer.gate.proj.weight], dim=1)
        theirs.in_proj_ba.weight.copy_(narrow.flatten(0, 1))
        theirs.conv1d.weight.copy_(mixer.conv.weight.flip(0).t().unsqueeze(1))
        theirs.dt_bias.copy_(mixer.gate.dt_bias)
        theirs.A_log.copy_(mixer.gate.A_log)
        theirs.norm.weight.copy_(mixer.norm.weight)
        theirs.out_proj.weight.copy_(mixer.out_proj.weight)
        peer.norms[2 * i].weight.copy_(block.mixer_norm.weight)
        peer.norms[2 * i + 1].weight.copy_(block.mlp_norm.weight)
        peer.mlps[i].gate_up.weight.copy_(block.mlp.gate_up.weight)
        peer.mlps[i].down.weight.copy_(block.mlp.down.weight)
