"""Run by test_convert_checkpoint_tool.py and test_smollm2.py.

converter_ranks.py save HF DIR            one rank: load a model folder, save it as training would
converter_ranks.py load PORTS MODELS...   two ranks: MODELS are HF=CHECKPOINT; every layout that fits holds the folder's
                                          weights after loading the checkpoint, bit for bit
converter_ranks.py stages CHECKPOINT DIR  two ranks: load a checkpoint onto two pipeline stages, save step 1 from there
converter_ranks.py fail HF DIR            one rank: a disk that fills up, and an interruption, amid the model
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from collab_megatron.config.sections import ParallelSection
from collab_megatron.errors import RunError, UserError
from collab_megatron.model.folder import read_hf_config
from collab_megatron.model.layout import check_layout
from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.actor.grid import RankGrid, close_grid, init_grid
from collab_megatron.trainer.checkpoint import from_hf, to_hf
from collab_megatron.trainer.checkpoint.save_load import load_checkpoint, save_checkpoint
from collab_megatron.wire.checkpoints import complete_checkpoints, read_info

LAYOUTS = (
    ParallelSection(tensor=2),
    ParallelSection(tensor=2, sequence_parallel=True),
    ParallelSection(pipeline=2),
    ParallelSection(data=2, expert=2),
)


def dtype_of(folder: Path) -> Literal["float32", "bfloat16"]:
    dtype: Literal["float32", "bfloat16"] = read_hf_config(folder)["dtype"]
    return dtype


def save(folder: Path, directory: Path, grid: RankGrid) -> None:
    actor = Actor.build(folder, dtype=dtype_of(folder), grid=grid, optimizer=None)
    save_checkpoint(actor, directory, step=0, extra={}, keep_last=1)


def load(ports: list[str], models: list[str]) -> None:
    for parallel, port in zip(LAYOUTS, ports, strict=True):
        os.environ["MASTER_PORT"] = port
        grid = init_grid(parallel, seed=0)
        for folder, checkpoint in ((Path(a), Path(b)) for a, b in (model.split("=") for model in models)):
            try:
                check_layout(read_hf_config(folder), parallel)
            except UserError:
                continue
            wanted = Actor.build(folder, dtype=dtype_of(folder), grid=grid, optimizer=None)
            actor = Actor.build(folder, dtype=dtype_of(folder), grid=grid, optimizer=None, load_weights=False)
            load_checkpoint(actor, checkpoint)
            for one, other in zip(wanted.chunks, actor.chunks, strict=True):
                for (name, old), new in zip(one.named_parameters(), other.parameters(), strict=True):
                    assert torch.equal(old, new), (parallel, folder, name)
            print("same", folder.name, grid.place, flush=True)
        close_grid()


def stages(checkpoint: Path, directory: Path) -> None:
    grid = init_grid(ParallelSection(pipeline=2), seed=0)
    folder = checkpoint / "hf"
    actor = Actor.build(folder, dtype=dtype_of(folder), grid=grid, optimizer=None, load_weights=False)
    load_checkpoint(actor, checkpoint)
    save_checkpoint(actor, directory, step=1, extra={"config": {"run": {"dir": "runs/x"}}}, keep_last=1)
    close_grid()


def fail(folder: Path, directory: Path, grid: RankGrid) -> None:
    complete = from_hf.checkpoint_from_hf(folder, directory / "good", grid, extra={})
    calls = 0
    plain_read, plain_write = from_hf.read_into, to_hf.write_shard

    def broken(error: BaseException, plain: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls % 4 == 0:
                raise error
            return plain(*args)

        return call

    full = OSError(errno.ENOSPC, "No space left on device")
    for error, wanted in ((full, RunError), (KeyboardInterrupt(), KeyboardInterrupt)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(from_hf, "read_into", broken(error, plain_read))
            patch.setattr(to_hf, "write_shard", broken(error, plain_write))
            with pytest.raises(wanted) as raised:
                from_hf.checkpoint_from_hf(folder, directory / "bad", grid, extra={})
            assert not complete_checkpoints(directory / "bad")
            with pytest.raises(wanted) as raised_back:
                to_hf.hf_from_checkpoint(read_info(complete), directory / "back", grid, max_shard_size="20KB")
        if wanted is RunError:
            assert "disk full" in str(raised.value)
            assert "disk full" in str(raised_back.value)
        assert [path.name for path in directory.iterdir()] == ["good"]


def main() -> None:
    what, *rest = sys.argv[1:]
    if what == "load":
        load(rest[0].split(","), rest[1:])
        return
    if what == "stages":
        stages(Path(rest[0]), Path(rest[1]))
        return
    grid = init_grid(ParallelSection(), seed=0)
    {"save": save, "fail": fail}[what](Path(rest[0]), Path(rest[1]), grid)
    close_grid()


if __name__ == "__main__":
    main()
