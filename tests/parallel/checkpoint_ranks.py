"""Run by test_checkpoint_parallel.py on several ranks.

checkpoint_ranks.py resume WORK TENSOR DATA DISTRIBUTED DTYPE NAME [OTHER ...]
    2 + 2 steps are bit for bit 4 steps; saves WORK/NAME. Then takes over each OTHER checkpoint, saved under another
    layout: its weights exactly, its next two steps to 1e-5.
checkpoint_ranks.py full WORK DISK
    a disk that fills up at different moments of a save.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from collab_megatron.actor.actor import Actor, StepResult
from collab_megatron.actor.grid import RankGrid, barrier, close_grid, init_grid
from collab_megatron.algorithms.losses import LossSum, sft_loss
from collab_megatron.batching.micro_batch import MicroBatch, split_by_tokens
from collab_megatron.checkpoint.folders import complete_checkpoints, newest_complete, read_info
from collab_megatron.checkpoint.store import load_checkpoint, save_checkpoint
from collab_megatron.config.sections import OptimizerSection, ParallelSection
from collab_megatron.convert.loader import SafetensorsFolder
from collab_megatron.errors import RunError
from tests.parallel.tiny import make_samples


def loss_fn(logprobs: Tensor, batch: MicroBatch) -> LossSum:
    return sft_loss(logprobs, mask=batch.mask)


def train(actor: Actor, step: int) -> StepResult:
    samples = make_samples(6, seed=step)
    tokens = sum(sum(s.mask) for s in samples)
    share = samples[actor.grid.dp_rank :: actor.grid.dp_size]
    return actor.train_step(split_by_tokens(share, micro_batch_tokens=60, pad_id=0), loss_fn, tokens)


def weights(actor: Actor) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in actor.hf_tensors()}


def section(distributed: bool, lr: float = 1e-3) -> OptimizerSection:
    return OptimizerSection(lr=lr, schedule="cosine", weight_decay=0.1, distributed=distributed)


def build(work: Path, kind: str, grid: RankGrid, distributed: bool, dtype: str) -> Actor:
    name = f"{kind}-bf16" if dtype == "bfloat16" else kind
    return Actor.build(work / name, dtype=dtype, grid=grid, optimizer=section(distributed), total_steps=8)  # type: ignore[arg-type]


def resume(grid: RankGrid, work: Path, distributed: bool, dtype: str, name: str, others: list[str]) -> None:
    whole = build(work, "qwen3", grid, distributed, dtype)
    for step in range(2):
        train(whole, step)
    started = time.perf_counter()
    saved = save_checkpoint(whole, work / name, step=2, extra={"data": [1, 2]}, keep_last=2)
    save_s = time.perf_counter() - started
    at_two, random_state = weights(whole), torch.get_rng_state()
    wanted = [train(whole, step) for step in (2, 3)]
    at_four = weights(whole)

    torch.manual_seed(99)
    again = build(work, "qwen3", grid, distributed, dtype)
    assert newest_complete(work / name) == saved
    started = time.perf_counter()
    info = load_checkpoint(again, saved)
    print(f"save {save_s:.2f} s, load {time.perf_counter() - started:.2f} s")
    assert (info.step, info.extra) == (2, {"data": [1, 2]})
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(t, at_two[n]) for n, t in weights(again).items())
    assert [train(again, step) for step in (2, 3)] == wanted
    assert all(torch.equal(t, at_four[n]) for n, t in weights(again).items())

    whole.save_hf(work / f"{name}-four")
    load_checkpoint(again, saved)
    again.save_hf(work / f"{name}-two")
    (work / f"{name}.json").write_text(json.dumps([result.grad_norm for result in wanted]))
    for other in others:
        take_over(grid, work, dtype, other)


def take_over(grid: RankGrid, work: Path, dtype: str, other: str) -> None:
    """Load what another layout saved and go on as it did."""
    folder = newest_complete(work / other)
    assert folder is not None
    taken = build(work, "qwen3", grid, read_info(folder).layout["distributed_optimizer"], dtype)
    load_checkpoint(taken, folder)
    with SafetensorsFolder(work / f"{other}-two") as two:
        assert all(torch.equal(t, two.read(n, tuple(t.shape), None, 0, 0)) for n, t in weights(taken).items()), other
    for step, norm in zip((2, 3), json.loads((work / f"{other}.json").read_text()), strict=True):
        found = train(taken, step)
        assert abs(found.grad_norm / norm - 1) < 1e-4, (other, step, found, norm)
    # other layouts add in another order, and AdamW makes a step out of the sign of the smallest gradients
    with SafetensorsFolder(work / f"{other}-four") as four:
        for n, t in weights(taken).items():
            wanted = four.read(n, tuple(t.shape), None, 0, 0)
            assert (t - wanted).norm() / wanted.norm() < 1e-3, (other, n, (t - wanted).norm() / wanted.norm())


def full(grid: RankGrid, work: Path, disk: Path) -> None:
    actor = build(work, "qwen3", grid, False, "float32")
    directory, filler = disk / "checkpoints", disk / "filler"
    saved = save_checkpoint(actor, directory, step=1, extra={}, keep_last=2)
    size = sum(f.stat().st_size for f in saved.rglob("*") if f.is_file())
    # room for nothing, not for the common part, for part of the tensors, for all but the last of them
    for room in (0, 300_000, size // 2, size - 50_000):
        if grid.is_main:
            _leave(disk, filler, room)
        barrier(grid)
        started = time.perf_counter()
        message = re.escape(f"disk full while saving to {directory}; earlier checkpoints are whole; free ")
        with pytest.raises(RunError, match=rf"^{message}\d+ MB and resume$"):
            save_checkpoint(actor, directory, step=2, extra={}, keep_last=2)
        assert time.perf_counter() - started < 20
        barrier(grid)
        assert [f.name for f in directory.iterdir()] == ["step_00000001"]
        assert complete_checkpoints(directory) == [saved]
        load_checkpoint(actor, saved)
        barrier(grid)
        if grid.is_main:
            filler.unlink()
        barrier(grid)
    save_checkpoint(actor, directory, step=2, extra={}, keep_last=1)
    assert newest_complete(directory) == directory / "step_00000002"
    assert not saved.exists()


def _leave(disk: Path, filler: Path, room: int) -> None:
    """Fill the disk until `room` bytes are left."""
    with filler.open("wb") as out:
        out.write(b"\0" * (shutil.disk_usage(disk).free - room))


def main() -> None:
    if sys.argv[1] == "full":
        grid = init_grid(ParallelSection(tensor=2, device="cpu", collective_timeout_s=60), seed=1)
        full(grid, Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        work, tensor, data, distributed, dtype, name, *others = sys.argv[2:]
        layout = ParallelSection(tensor=int(tensor), data=int(data), device="cpu", collective_timeout_s=60)
        resume(init_grid(layout, seed=1), Path(work), distributed == "1", dtype, name, others)
    close_grid()


if __name__ == "__main__":
    main()
