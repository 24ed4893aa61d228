"""Run by test_checkpoint_parallel.py on several ranks.

checkpoint_ranks.py layouts WORK HOW_MANY
    every layout of checkpoint_layouts.py, one after the other on the same two processes: 2 + 2 steps are bit for bit 4
    steps; then each starts from the weights of what another one saved, exactly, and takes over what the HOW_MANY that
    follow it saved: their weights exactly, their next two losses to 1e-5. Of a list of
    other optimizers' saves it takes over all.
checkpoint_ranks.py disk WORK DISK
    a disk that fills up at different moments of a save; an asynchronous save: the same bytes, not changed by the
    steps taken meanwhile, a full disk heard where it is waited for.
checkpoint_ranks.py alone WORK
    files made to run code; then the process kills itself during an asynchronous save.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from collab_megatron.config.sections import OptimizerSection, ParallelSection
from collab_megatron.errors import RunError, UserError
from collab_megatron.launch.ports import free_port
from collab_megatron.trainer.actor.actor import Actor, StepResult
from collab_megatron.trainer.actor.grid import RankGrid, close_grid, init_grid
from collab_megatron.trainer.batching.micro_batch import MicroBatch, collate
from collab_megatron.trainer.checkpoint import save_load
from collab_megatron.trainer.checkpoint.async_save import AsyncSave, grid_for_saves
from collab_megatron.trainer.checkpoint.save_load import (
    Retention,
    begin_save,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from collab_megatron.trainer.convert.loader import SafetensorsFolder
from collab_megatron.trainer.loss.losses import LossSum, sft_loss
from collab_megatron.wire.checkpoints import complete_checkpoints, newest_complete, read_info
from tests.trainer.parallel.checkpoint_layouts import BF16_TAKE_OVERS, BOUNDS, SAVES, TAKE_OVERS, Layout
from tests.trainer.parallel.tiny import make_samples


def loss_fn(logprobs: Tensor, batch: MicroBatch) -> LossSum:
    return sft_loss(logprobs, mask=batch.mask)


def train(actor: Actor, step: int) -> StepResult:
    """One step on eight samples, four at a time: two micro-batches, one on each of two data ranks."""
    samples, grid = make_samples(8, seed=step), actor.grid
    mine = range(len(samples))[grid.dp_rank :: grid.dp_size]
    parts = [mine[i : i + 4] for i in range(0, len(mine), 4)]
    batches = [collate([samples[i] for i in part], tuple(part), 0, grid.pad_multiple, False) for part in parts]
    return actor.train_step(batches, loss_fn, sum(sum(s.mask) for s in samples))


def weights(actor: Actor) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in actor.hf_tensors()}


def build(
    work: Path,
    kind: str,
    grid: RankGrid,
    distributed: bool = False,
    cpu_offload: float = 0.0,
    folder: Path | None = None,
) -> Actor:
    section = OptimizerSection(
        lr=1e-3, schedule="cosine", weight_decay=0.1, distributed=distributed, cpu_offload=cpu_offload
    )
    dtype = "bfloat16" if kind.endswith("bf16") else "float32"
    folder = folder or work / kind
    return Actor.build(folder, dtype=dtype, grid=grid, optimizer=section, total_steps=8)  # type: ignore[arg-type]


def resume(grid: RankGrid, work: Path, kind: str, layout: Layout) -> None:
    """Saved at step 2 and resumed by another actor: every number is that of a run that never stopped."""
    saved_under = work / f"{kind}-{layout.name}"
    whole = build(work, kind, grid, layout.distributed, layout.cpu_offload)
    for step in range(2):
        train(whole, step)
    saved = save_checkpoint(whole, saved_under, step=2, extra={"data": [1, 2]}, keep_last=2)
    at_two, random_state = weights(whole), torch.get_rng_state()
    whole.save_hf(saved_under / "two")
    wanted = [train(whole, step) for step in (2, 3)]
    at_four = weights(whole)
    whole.save_hf(saved_under / "four")

    torch.manual_seed(99)
    again = build(work, kind, grid, layout.distributed, layout.cpu_offload)
    assert newest_complete(saved_under) == saved
    info = load_checkpoint(again, saved)
    assert (info.step, info.extra) == (2, {"data": [1, 2]})
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(t, at_two[n]) for n, t in weights(again).items())
    assert [train(again, step) for step in (2, 3)] == wanted
    assert all(torch.equal(t, at_four[n]) for n, t in weights(again).items())
    if grid.is_main:
        figures = [[result.metrics["loss"], result.grad_norm, result.lr] for result in wanted]
        (saved_under / "wanted.json").write_text(json.dumps(figures))


def take_over(taken: Actor, saved_under: Path) -> dict[str, float]:
    """Load what another layout saved and go on as it did; the largest relative differences."""
    folder = newest_complete(saved_under)
    assert folder is not None
    load_checkpoint(taken, folder)
    with SafetensorsFolder(saved_under / "two") as two:
        for n, t in weights(taken).items():
            assert torch.equal(t, two.read(n, tuple(t.shape), None, 0, 0)), n
    worst = {"loss": 0.0, "norm": 0.0, "weights": 0.0}
    for step, (loss, norm, lr) in zip((2, 3), json.loads((saved_under / "wanted.json").read_text()), strict=True):
        found = train(taken, step)
        assert found.lr == lr
        worst["loss"] = max(worst["loss"], abs(found.metrics["loss"] / loss - 1))
        worst["norm"] = max(worst["norm"], abs(found.grad_norm / norm - 1))
    with SafetensorsFolder(saved_under / "four") as four:
        for n, t in weights(taken).items():
            wanted = four.read(n, tuple(t.shape), None, 0, 0)
            worst["weights"] = max(worst["weights"], float((t - wanted).norm() / wanted.norm()))
    # other layouts add in another order: fp32 keeps 7 digits (seen: 2e-7, 3e-7, 3e-8), bf16 two or three
    bounds = BOUNDS[taken.dtype]
    assert all(worst[name] < bound for name, bound in bounds.items()), worst
    return worst


def start_from(grid: RankGrid, work: Path, kind: str, layout: Layout, other: Layout) -> None:
    """The weights alone of what another layout saved: every number is that of a run from the same weights as an HF
    folder, whose optimizer knows nothing."""
    saved_under = work / f"{kind}-{other.name}"
    folder = newest_complete(saved_under)
    assert folder is not None
    started = build(work, kind, grid, layout.distributed, layout.cpu_offload)
    assert load_weights(started, folder).step == 2
    plain = build(work, kind, grid, layout.distributed, layout.cpu_offload, saved_under / "two")
    assert [train(started, step) for step in (0, 1)] == [train(plain, step) for step in (0, 1)]
    wanted = weights(plain)
    assert all(torch.equal(t, wanted[n]) for n, t in weights(started).items())


class Grids:
    """A grid for each layout in turn, over a fresh port that rank 0 finds. A layout of one rank is rank 0's alone."""

    def __init__(self, work: Path) -> None:
        self._work, self._rank, self._opened = work, int(os.environ["RANK"]), 0

    def open(self, layout: Layout) -> RankGrid | None:
        section = ParallelSection(device="cpu", collective_timeout_s=60, **layout.parallel)
        self._opened += 1
        if self._rank >= section.world_size:
            return None
        os.environ.update(MASTER_PORT=self._port(), WORLD_SIZE=str(section.world_size))
        return init_grid(section, seed=1)

    def _port(self) -> str:
        told = self._work / f"port-{self._opened}"
        if self._rank == 0:
            (self._work / "port").write_text(str(free_port()))
            (self._work / "port").rename(told)
        while not told.exists():  # at most run_ranks' deadline
            time.sleep(0.01)
        return told.read_text()


def layouts(work: Path, how_many: int) -> None:
    grids = Grids(work)
    for kind, layout in SAVES:
        started = time.monotonic()
        if grid := grids.open(layout):
            resume(grid, work, kind, layout)
            close_grid()
            print(f"{kind} {layout.name}: resumed bit for bit, {time.monotonic() - started:.1f} s", flush=True)
    for kind, others, layout in TAKE_OVERS + BF16_TAKE_OVERS:
        if grid := grids.open(layout):
            at = others.index(layout) + 1 if layout in others else 0
            following = [other for other in (*others[at:], *others[:at]) if other is not layout]
            start_from(grid, work, kind, layout, following[0])
            taken = build(work, kind, grid, layout.distributed, layout.cpu_offload)
            for other in following[: how_many if layout in others else None]:
                started = time.monotonic()
                try:
                    worst = take_over(taken, work / f"{kind}-{other.name}")
                except Exception as error:
                    error.add_note(f"{kind}: {layout.name} taking over {other.name}")
                    raise
                said = " ".join(f"{name} {value:.1e}" for name, value in worst.items())
                print(f"{kind}: {layout.name} took over {other.name}, {said}, {time.monotonic() - started:.1f} s")
            close_grid()


def background(grid: RankGrid, work: Path, disk: Path) -> None:
    actor = build(work, "qwen3", grid, distributed=True)
    save_grid = grid_for_saves(grid)
    train(actor, 0)
    at_once = save_checkpoint(actor, work / "at-once", step=1, extra={"a": 1}, keep_last=2)
    for _ in range(2):  # the second over the first: the same step again
        pending = begin_save(actor, work / "async", step=1, extra={"a": 1}, keep=Retention(2), copy=True)
        running = AsyncSave(pending, save_grid)
        before = weights(actor)
        train(actor, 1)
        running.wait()
        load_checkpoint(actor, at_once)
        assert all(torch.equal(t, before[n]) for n, t in weights(actor).items())
    written = work / "async" / at_once.name
    names = {f.relative_to(at_once) for f in at_once.rglob("*") if f.is_file()}
    assert names == {f.relative_to(written) for f in written.rglob("*") if f.is_file()}
    for name in names:
        if name.name != ".metadata":  # holds the folder's name and a random id
            assert (at_once / name).read_bytes() == (written / name).read_bytes(), name
    load_checkpoint(actor, written)
    assert all(torch.equal(t, before[n]) for n, t in weights(actor).items())
    train(actor, 1)

    # a disk too small for the tensors (`full` has left a checkpoint there): all ranks hear of it where they wait
    kept = complete_checkpoints(disk / "checkpoints")
    pending = begin_save(actor, disk / "checkpoints", step=3, extra={}, keep=Retention(2), copy=True)
    filler = disk / "filler"
    if grid.is_main:
        _leave(disk, filler, 100_000)
    dist.barrier(group=grid.cpu_group)
    running = AsyncSave(pending, save_grid)
    train(actor, 2)
    with pytest.raises(RunError, match=r"^disk full while saving to .*; earlier checkpoints are whole; free \d+ MB"):
        running.wait()
    dist.barrier(group=grid.cpu_group)  # rank 0 has removed the attempt
    assert complete_checkpoints(disk / "checkpoints") == kept
    assert list((disk / "checkpoints").iterdir()) == kept
    dist.barrier(group=grid.cpu_group)
    if grid.is_main:
        filler.unlink()
    dist.barrier(group=grid.cpu_group)
    AsyncSave(begin_save(actor, disk / "checkpoints", step=4, extra={}, keep=Retention(1), copy=True), save_grid).wait()
    assert newest_complete(disk / "checkpoints") == disk / "checkpoints" / "step_00000004"


def full(grid: RankGrid, work: Path, disk: Path) -> None:
    actor = build(work, "qwen3", grid)
    directory, filler = disk / "checkpoints", disk / "filler"
    saved = save_checkpoint(actor, directory, step=1, extra={}, keep_last=2)
    size = sum(f.stat().st_size for f in saved.rglob("*") if f.is_file())
    # room for nothing, not for the common part, for part of the tensors, for all but the last of them
    for room in (0, 300_000, size // 2, size - 50_000):
        if grid.is_main:
            _leave(disk, filler, room)
        dist.barrier(group=grid.cpu_group)
        started = time.perf_counter()
        message = re.escape(f"disk full while saving to {directory}; earlier checkpoints are whole; free ")
        with pytest.raises(RunError, match=rf"^{message}\d+ MB and resume$"):
            save_checkpoint(actor, directory, step=2, extra={}, keep_last=2)
        assert time.perf_counter() - started < 20
        dist.barrier(group=grid.cpu_group)
        assert [f.name for f in directory.iterdir()] == ["step_00000001"]
        assert complete_checkpoints(directory) == [saved]
        load_checkpoint(actor, saved)
        dist.barrier(group=grid.cpu_group)
        if grid.is_main:
            filler.unlink()
        dist.barrier(group=grid.cpu_group)
    save_checkpoint(actor, directory, step=2, extra={}, keep_last=1)
    assert newest_complete(directory) == directory / "step_00000002"
    assert read_info(directory / "step_00000002").layout["tensor"] == 2
    assert not saved.exists()


class Payload:
    """What a hostile pickle does when it is loaded as any other."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._trace),)


def hostile(grid: RankGrid, work: Path) -> None:
    """Every file of a checkpoint in turn made to run code by who loads it: refused with a UserError, and never run."""
    actor = build(work, "qwen3", grid)
    train(actor, 0)
    whole = save_checkpoint(actor, work / "whole", step=1, extra={}, keep_last=1)
    trace, before = work / "executed", weights(actor)
    with pytest.raises(FileExistsError):  # the payload works
        trace.mkdir()
        pickle.loads(pickle.dumps(Payload(trace)))
    trace.rmdir()
    zipped = io.BytesIO()
    torch.save(Payload(trace), zipped)

    def metadata_of(model: Path) -> Any:
        return pickle.loads((model / ".metadata").read_bytes())

    def common(model: Path) -> None:
        (model / "common.pt").write_bytes(zipped.getvalue())

    def old_common(model: Path) -> None:
        (model / "common.pt").write_bytes(pickle.dumps(Payload(trace)))

    def metadata(model: Path) -> None:
        (model / ".metadata").write_bytes(pickle.dumps(Payload(trace)))

    def inside_metadata(model: Path) -> None:
        found = metadata_of(model)
        found.planner_data = Payload(trace)
        (model / ".metadata").write_bytes(pickle.dumps(found))

    def tensors(model: Path) -> None:
        """Every tensor leads to the payload."""
        found = metadata_of(model)
        (model / "__0_0.distcp").write_bytes(zipped.getvalue())
        for stored in found.storage_data.values():
            stored.offset, stored.length = 0, len(zipped.getvalue())
        (model / ".metadata").write_bytes(pickle.dumps(found))

    def bytes_entry(model: Path) -> None:
        """A tensor that is declared an object, which torch loads without restriction."""
        found = metadata_of(model)
        key = next(iter(found.state_dict_metadata))
        found.state_dict_metadata[key] = BytesStorageMetadata()
        (model / ".metadata").write_bytes(pickle.dumps(found))

    def elsewhere(model: Path) -> None:
        found = metadata_of(model)
        for stored in found.storage_data.values():
            stored.relative_path = "../../somewhere.distcp"
        (model / ".metadata").write_bytes(pickle.dumps(found))

    for spoil in (common, old_common, metadata, inside_metadata, tensors, bytes_entry, elsewhere):
        spoiled = work / "spoiled" / whole.name
        shutil.copytree(whole, spoiled)
        spoil(spoiled / "model")
        with pytest.raises(UserError, match=r"it is damaged or hostile; resume from another checkpoint"):
            load_checkpoint(actor, spoiled)
        assert not trace.exists(), spoil.__name__
        shutil.rmtree(spoiled)
    load_checkpoint(actor, whole)
    assert all(torch.equal(t, before[n]) for n, t in weights(actor).items())


def killed(grid: RankGrid, work: Path) -> None:
    """Kills itself during an asynchronous save that lacks only its marker."""
    actor = build(work, "qwen3", grid)
    save_checkpoint(actor, work / "killed", step=1, extra={}, keep_last=2)
    reached = threading.Event()

    def never(*_: Any, **__: Any) -> None:
        reached.set()
        time.sleep(600)

    save_load.write_marker = never
    running = AsyncSave(
        begin_save(actor, work / "killed", step=2, extra={}, keep=Retention(2), copy=True), grid_for_saves(grid)
    )
    assert reached.wait(60), running
    os.kill(os.getpid(), signal.SIGKILL)


def _leave(disk: Path, filler: Path, room: int) -> None:
    """Fill the disk until `room` bytes are left."""
    with filler.open("wb") as out:
        out.write(b"\0" * (shutil.disk_usage(disk).free - room))


def main() -> None:
    mode, work, *rest = sys.argv[1:]
    if mode == "layouts":
        layouts(Path(work), int(rest[0]))
        return
    split = {"tensor": 2} if mode == "disk" else {}
    grid = init_grid(ParallelSection(device="cpu", collective_timeout_s=60, **split), seed=1)
    if mode == "disk":
        full(grid, Path(work), Path(rest[0]))
        background(grid, Path(work), Path(rest[0]))
        close_grid()
    else:
        hostile(grid, Path(work))
        print("hostile: refused", flush=True)
        killed(grid, Path(work))


if __name__ == "__main__":
    main()
