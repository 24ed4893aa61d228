"""Seconds that a checkpoint costs training: saved synchronously, and in the background (train.async_save).

    python tools/bench/checkpoint.py FOLDER [--layers 4] [--dtype float32] [--distributed] [--json FILE]

FOLDER is on the disk to measure. One rank, a random model, full optimizer state. `at_once_s` is a synchronous save. Of
a background save, `blocking_s` is the wait of training and `beside_s` the time until it is complete; the two `step`
figures are a step alone and a step during a save. Medians of `--repeats`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collab_megatron.config.sections import OptimizerSection, ParallelSection
from collab_megatron.errors import UserError, run_cli
from collab_megatron.files import publish_json

if TYPE_CHECKING:
    from collab_megatron.trainer.actor.actor import Actor

HIDDEN, VOCABULARY, SAMPLES, LENGTH = 512, 8192, 4, 128


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python tools/bench/checkpoint.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--distributed", action="store_true", help="megatron's DistributedOptimizer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not args.folder.is_dir():
        raise UserError(f"{args.folder} is not a folder: name one on the disk to measure")
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench_checkpoint_") as folder:
        figures = measure(Path(folder), args)
    for name, value in figures.items():
        print(f"{name:24}{value:12.4g}")
    if args.json is not None:
        publish_json(args.json, figures)


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    from collab_megatron.trainer.actor.grid import (  # only here: usage errors should not wait for megatron
        close_grid,
        init_grid,
    )
    from collab_megatron.trainer.checkpoint.async_save import AsyncSave, grid_for_saves
    from collab_megatron.trainer.checkpoint.save_load import Retention, begin_save, load_checkpoint, save_checkpoint

    grid = init_grid(ParallelSection(), seed=1)
    save_grid, actor = grid_for_saves(grid), build(folder / "model", grid, args)
    step = stepper(actor)
    step()
    saves, blocking, written, meanwhile, loads = [], [], [], [], []
    for _ in range(args.repeats):
        saves.append(seconds(lambda: save_checkpoint(actor, folder / "at-once", step=1, extra={}, keep_last=1)))
        loads.append(seconds(lambda: load_checkpoint(actor, folder / "at-once" / "step_00000001")))
        start = time.monotonic()
        pending = begin_save(actor, folder / "asynchronous", step=1, extra={}, keep=Retention(1), copy=True)
        running = AsyncSave(pending, save_grid)
        blocking.append(time.monotonic() - start)
        while running.is_running:
            meanwhile.append(seconds(step))
        running.wait()
        written.append(time.monotonic() - start)
    alone = [seconds(step) for _ in range(2 * args.repeats)]
    figures = {
        "checkpoint_mb": sum(f.stat().st_size for f in (folder / "at-once").rglob("*") if f.is_file()) / 1e6,
        "at_once_s": statistics.median(saves),
        "blocking_s": statistics.median(blocking),
        "beside_s": statistics.median(written),
        "step_alone_s": statistics.median(alone),
        "step_meanwhile_s": statistics.median(meanwhile),
        "load_s": statistics.median(loads),
    }
    close_grid()
    return figures


def build(folder: Path, grid: Any, args: argparse.Namespace) -> Actor:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from collab_megatron.trainer.actor.actor import Actor

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(getattr(torch, args.dtype)).save_pretrained(folder)
    section = OptimizerSection(distributed=args.distributed)
    return Actor.build(folder, dtype=args.dtype, grid=grid, optimizer=section, total_steps=10)


def stepper(actor: Actor) -> Callable[[], None]:
    from collab_megatron.trainer.batching.micro_batch import TokenSample, collate
    from collab_megatron.trainer.loss.losses import sft_loss

    samples = [
        TokenSample(ids=[(7 * i + n) % 8000 for i in range(LENGTH)], mask=[1.0] * LENGTH) for n in range(SAMPLES)
    ]
    batch = collate(samples, tuple(range(SAMPLES)), 0, 1, False)

    def step() -> None:
        actor.train_step([batch], lambda logprobs, cut: sft_loss(logprobs, mask=cut.mask), SAMPLES * LENGTH)

    return step


def seconds(action: Callable[[], object]) -> float:
    start = time.monotonic()
    action()
    return time.monotonic() - start


if __name__ == "__main__":
    run_cli(main)
