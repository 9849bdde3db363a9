"""Times a whole training step on a CPU, beside the same model built from transformers' layers, and says where the time goes.

    python benchmarks/training_step.py                      # ours and transformers', step by step in turn
    python benchmarks/training_step.py --profile quick      # the share of a step per group of work

Both run with the allocator settings that a launch gives its workers. Steps are interleaved, so that whatever else the machine
does falls on both; medians over the rounds, spread = distance of the quartiles over the median.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from training_step_peer import Peer, copy_weights
from training_step_profile import shares

from deltalab import registry
from deltalab.platform.config import TrainingConfig
from deltalab.platform.scheduling.executor import ENVIRONMENT
from deltalab.platform.tasks import Split, build_task
from deltalab.platform.training import Hardware, Trainer, prepare_device
from deltalab.recurrences import LanguageModel

VOCAB, WIDTH, LAYERS, HEADS, MLP, BATCH, LENGTH = 256, 256, 6, 4, 704, 8, 512
ALLOCATOR = {name: value for name, value in ENVIRONMENT.items() if name.startswith("MALLOC_")}
FOREVER = 10**9


class Noise:
    """Random bytes: the arithmetic of a step does not depend on which they are."""

    def __init__(self, length: int = LENGTH) -> None:
        self.length = length

    def __len__(self) -> int:
        return 4096

    def rows(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        tokens = np.random.default_rng(index[0]).integers(0, VOCAB, (len(index), self.length + 1))
        return tokens[:, :-1], tokens[:, 1:]


def trainer_of(model: LanguageModel, split: Split, batch: int, hardware: Hardware) -> Trainer:
    config = TrainingConfig(steps=FOREVER, batch=batch, checkpoint_seconds=FOREVER)
    return Trainer(model.train(), split, config, 0, hardware, Path(tempfile.mkdtemp()) / "checkpoint.pt")


def step_of(trainer: Trainer) -> Callable[[], float]:
    """One step of the training loop; its loss."""

    def step() -> float:
        loss, _ = trainer._one_step(1e-3)
        trainer.step += 1
        return float(loss)

    return step


def bytes_model(card: str = "gdn") -> LanguageModel:
    return LanguageModel(
        registry.load(card), vocab=VOCAB, width=WIDTH, layers=LAYERS, heads=HEADS, mlp_hidden=MLP, output_gate="silu", seed=0
    )


def quick_model(card: str = "gdn") -> LanguageModel:
    sizes = {"vocab": 256, "width": 64, "layers": 2, "heads": 2, "head_width": 24, "init_std": 0.125}
    return LanguageModel(registry.load(card), tied=False, seed=0, **sizes)


def trial(name: str, card: str, threads: int, precision: str) -> Trainer:
    """The `quick` study's recall trial, or a byte-level language model of 6 layers."""
    if name == "quick":
        data = build_task({"name": "mqar", "preset": "quick"}).prepare(Path(tempfile.mkdtemp()))
        return trainer_of(quick_model(card), data.train, 64, prepare_device(threads, precision, 64))
    return trainer_of(bytes_model(card), Noise(), BATCH, prepare_device(threads, precision, WIDTH))


def interleaved(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Name -> milliseconds of every round, after two rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(rounds + 2):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            began = time.perf_counter()
            steps[name]()
            if number >= 2:
                times[name].append(1e3 * (time.perf_counter() - began))
    return times


def compare(threads: int, rounds: int, precisions: list[str]) -> None:
    steps: dict[str, Callable[[], object]] = {}
    for precision in precisions:
        hardware = prepare_device(threads, precision, WIDTH)
        ours, peer = bytes_model(), Peer(VOCAB, WIDTH, LAYERS, HEADS, MLP)
        copy_weights(ours, peer)
        trainer = trainer_of(ours, Noise(), BATCH, hardware)
        steps[f"ours {precision}"] = step_of(trainer)
        rows = Noise().rows(trainer._order.rows(0))
        steps[f"transformers {precision}"] = peer.training_step(Noise(), BATCH, hardware)
        tokens = torch.from_numpy(rows[0])
        with torch.no_grad():
            apart = (ours(tokens) - peer(tokens)).abs().max().item()
        print(
            f"{precision}: parameters {ours.parameter_count():,} and {peer.parameter_count():,}; largest logit apart {apart:.1e}"
        )
    times = interleaved(steps, rounds)
    print(f"\n| step of {BATCH} x {LENGTH} | ms | spread | tokens/s |\n|---|---:|---:|---:|")
    for name, found in times.items():
        median = statistics.median(found)
        low, _, high = statistics.quantiles(found, n=4)
        print(f"| {name} | {median:.1f} | {(high - low) / median:.0%} | {1e3 * BATCH * LENGTH / median:,.0f} |")
    for precision in precisions:
        pairs = zip(times[f"transformers {precision}"], times[f"ours {precision}"], strict=True)
        print(f"ratio {precision}: {statistics.median(b / a for b, a in pairs):.2f} (median of the rounds)")


def precisions(threads: int, rounds: int) -> None:
    """From which width bf16 pays: 4 layers of heads of 64, batches of 8 x 256."""
    print("| width | fp32 ms | bf16 ms | fp32 / bf16, median of the rounds |\n|---:|---:|---:|---:|")
    for width in (64, 128, 192, 256, 512):
        steps: dict[str, Callable[[], object]] = {}
        for precision in ("fp32", "bf16"):
            model = LanguageModel(
                registry.load("gdn"),
                vocab=VOCAB,
                width=width,
                layers=4,
                heads=width // 64,
                mlp_ratio=2.75,
                output_gate="silu",
                seed=0,
            )
            steps[precision] = step_of(trainer_of(model, Noise(256), BATCH, prepare_device(threads, precision, width)))
        times = interleaved(steps, rounds)
        ratio = statistics.median(a / b for a, b in zip(times["fp32"], times["bf16"], strict=True))
        print(
            f"| {width} | {statistics.median(times['fp32']):.1f} | {statistics.median(times['bf16']):.1f} | {ratio:.2f} |",
            flush=True,
        )


def profile(name: str, card: str, threads: int, precision: str, rounds: int) -> None:
    trainer = trial(name, card, threads, precision)
    step = step_of(trainer)
    for _ in range(3):
        step()
    times = [1e3 * _timed(step) for _ in range(rounds)]
    low, _, high = statistics.quantiles(times, n=4)
    median = statistics.median(times)
    print(f"{name}, {card}, {trainer.hardware.precision}: {median:.2f} ms a step, spread {(high - low) / median:.0%}")
    found = shares(trainer, step, max(3, rounds // 3))
    print("| group | forward | backward | share of a step |\n|---|---:|---:|---:|")
    for group, (forward, backward) in found.items():
        print(f"| {group} | {forward:.1%} | {backward:.1%} | {forward + backward:.1%} |")


def _timed(step: Callable[[], object]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=("quick", "bytes"))
    parser.add_argument("--widths", action="store_true", help="fp32 against bf16 at several widths")
    parser.add_argument("--card", default="gdn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--precision", action="append", choices=("auto", "fp32", "bf16"))
    given = parser.parse_args()
    if any(os.environ.get(name) is None for name in ALLOCATOR):  # glibc reads them when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**ALLOCATOR, **os.environ})
    settings = " ".join(f"{name}={os.environ[name]}" for name in ALLOCATOR)
    print(f"torch {torch.__version__}, {given.threads} threads, {settings}")
    if given.profile:
        profile(given.profile, given.card, given.threads, (given.precision or ["fp32"])[0], given.rounds)
    elif given.widths:
        precisions(given.threads, given.rounds)
    else:
        compare(given.threads, given.rounds, given.precision or ["fp32", "bf16"])


if __name__ == "__main__":
    main()
