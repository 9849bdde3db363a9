"""One decoded token on a CPU: a model's step beside the same model through the chunk form, and one Gated DeltaNet layer beside
transformers' (Qwen3-Next: its recurrent step in plain PyTorch, its cache). Prints the tables of cpu-decode.md. Speed alone:
tests/recurrences/test_decode_compiled.py says that a decoded token is the right one.

    python benchmarks/decode.py --threads 1 2 --batch 1 16

Every contender takes ten tokens a round, one after the other as in decoding, each carrying its own state on; then the next one.
Medians over the rounds. `chunk`: the chunk form of one token, as every layer would decode without a path of its own. `products`:
torch's products with all projections and the head alone, which the chunk form takes as well.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from deltalab import Mixer, registry
from deltalab.kernels import chunked
from deltalab.recurrences import LanguageModel, mixer
from deltalab.recurrences.layers import Projection

CARDS = (
    *("deltanet", "gdn", "kda", "pgdn", "osdn", "kla", "comba", "mamba2"),
    *("deltaproduct", "gated_deltaproduct", "rls", "mesanet"),
)
WIDTH, HEADS, LAYERS, VOCAB, PROMPT, TOKENS = 256, 4, 2, 256, 64, 10
Step = Callable[[], object]


def chunk_form(
    q: Tensor,
    read_key: Tensor | None,
    write_key: Tensor | None,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    initial_state: Tensor,
    beta: Tensor | None,
    **rest: Any,
) -> tuple[Tensor, Tensor]:
    """`delta_rule` by the chunk form, whatever the length."""
    key = read_key if rest["erase"] else None
    if write_key is None:
        assert beta is not None and read_key is not None, "a write key, or the step to make it with"
        write_key = beta.unsqueeze(-1) * read_key
    return chunked.delta_rule(q, key, write_key, v, log_decay, initial_state, q.shape[-1] ** -0.5, 64, initial_state.dtype)


def stepping(model: LanguageModel, tokens: Tensor) -> Step:
    """One token after the other, after a prompt."""
    batch = len(tokens)
    _, state = model(torch.randint(VOCAB, (batch, PROMPT)), state=model.initial_state(batch))

    def one() -> None:
        nonlocal state
        _, state = model(tokens, state=state)

    return one


def model_steps(card: str, batch: int) -> dict[str, Step]:
    tokens = torch.randint(VOCAB, (batch, 1))

    def model(backend: str) -> LanguageModel:
        return LanguageModel(
            registry.load(card), vocab=VOCAB, width=WIDTH, layers=LAYERS, heads=HEADS, backend=backend, seed=0
        ).eval()

    chunk = model("torch")
    one = stepping(chunk, tokens)

    def through_chunks() -> None:
        with mock.patch.object(mixer, "delta_rule", chunk_form):
            one()

    weights = [module.weight for layer in chunk.mixers() for module in layer.modules() if isinstance(module, Projection)]
    inputs = [torch.randn(batch, 1, weight.shape[1]) for weight in (*weights, chunk.embedding.weight)]

    def products() -> None:
        for x, weight in zip(inputs, (*weights, chunk.embedding.weight), strict=True):
            F.linear(x, weight)

    return {"deltalab": stepping(model("auto"), tokens), "chunk": through_chunks, "products": products}


def layer_steps(batch: int) -> dict[str, Step]:
    """A layer with its output gate, as Qwen3-Next has it: the same sizes, projections and state."""
    from transformers import Qwen3NextConfig
    from transformers.cache_utils import DynamicCache
    from transformers.models.qwen3_next import modeling_qwen3_next as peer

    for name in ("torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule", "causal_conv1d_fn", "causal_conv1d_update"):
        setattr(peer, name, inspect.unwrap(getattr(peer, name)))  # plain PyTorch, whatever GPU package is installed
    head = WIDTH // HEADS
    config = Qwen3NextConfig(
        hidden_size=WIDTH,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=HEADS,
        linear_num_value_heads=HEADS,
        linear_key_head_dim=head,
        linear_value_head_dim=head,
        linear_conv_kernel_dim=4,
    )
    theirs, cache = peer.Qwen3NextGatedDeltaNet(config, 0).eval(), DynamicCache(config=config)
    ours = Mixer(registry.load("gdn"), width=WIDTH, heads=HEADS, output_gate="silu", seed=0)
    prompt, x = torch.randn(batch, PROMPT, WIDTH), torch.randn(batch, 1, WIDTH)
    theirs(prompt, cache)
    _, state = ours(prompt, state=ours.initial_state(batch))

    def one() -> None:
        nonlocal state
        _, state = ours(x, state=state)

    return {"deltalab": one, "transformers": lambda: theirs(x, cache)}


def rounds(steps: dict[str, Step], repeats: int) -> dict[str, tuple[float, float]]:
    """Microseconds of a step, and their spread (distance of the quartiles over the median), of each."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(TOKENS):
                step()
            if turn >= 2:
                seconds[name].append((time.perf_counter() - start) / TOKENS)
    found = {}
    for name, times in seconds.items():
        low, median, high = statistics.quantiles(times, n=4)
        found[name] = (1e6 * median, (high - low) / median)
    return found


def table(title: str, peers: Sequence[str], cases: dict[tuple[object, ...], dict[str, Step]], repeats: int) -> None:
    """Medians of us and of its `peers`, their spreads, and how many times our time the first peer takes."""
    names = ("deltalab", *peers)
    heads = " | ".join(f"{name} us | spread" for name in names)
    print(f"\n| {title} | {heads} | ratio |\n|---|{'---:|' * (2 * len(names) + 1)}", flush=True)
    for case, steps in cases.items():
        found = rounds(steps, repeats)
        cells = " | ".join(f"{found[name][0]:.0f} | {found[name][1]:.0%}" for name in names)
        ratio = found[peers[0]][0] / found["deltalab"][0]
        print(f"| {', '.join(map(str, case))} | {cells} | {ratio:.1f} |", flush=True)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--cards", nargs="+", default=list(CARDS))
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    for threads in options.threads:
        torch.set_num_threads(threads)
        print(f"\n{threads} thread{'s' * (threads > 1)}")
        models = {(card, f"batch {batch}"): model_steps(card, batch) for card in options.cards for batch in options.batch}
        table("model", ("chunk", "products"), models, options.repeats)
        layers = {("gdn", f"batch {batch}"): layer_steps(batch) for batch in options.batch}
        table("layer", ("transformers",), layers, options.repeats)


if __name__ == "__main__":
    main()
