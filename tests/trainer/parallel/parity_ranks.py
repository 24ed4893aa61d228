"""Run by test_parity_parallel.py on several ranks: every architecture under every layout, in one set of processes.

    parity_ranks.py WORK LAYOUTS

WORK/<kind> and WORK/<kind>-bf16 are model folders, WORK/<kind>.pt samples and what transformers says of them, once for
all ranks. LAYOUTS is a JSON list of {"name", "port", "kinds", "parallel"}: each layout has a process group of its own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from collab_megatron.config.sections import ParallelSection
from collab_megatron.model.tables import rows
from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.actor.grid import RankGrid, close_grid, init_grid
from collab_megatron.trainer.batching.micro_batch import TokenSample, split_by_tokens
from collab_megatron.trainer.convert.loader import SafetensorsFolder
from collab_megatron.trainer.convert.placement import stage_of

TOLERANCE = 1e-5
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def check_logprobs(actor: Actor, reference: Path) -> float:
    """The largest difference of a log-probability or an entropy from transformers'."""
    grid, wanted = actor.grid, torch.load(reference)
    samples = [TokenSample(ids=ids, mask=[1.0] * len(ids)) for ids in wanted["ids"]]
    batches = split_by_tokens(samples, micro_batch_tokens=60, pad_id=0, pad_multiple=grid.pad_multiple)
    worst = 0.0
    for batch, *found in zip(batches, *actor.logprobs(batches), strict=True):
        for values, truth in zip(found, ("logprobs", "entropies"), strict=True):
            for index, ours in zip(batch.sample_indices, batch.per_sample(values), strict=True):
                worst = max(worst, (ours - wanted[truth][index]).abs().max().item())
    assert worst <= TOLERANCE, f"{reference.stem}: log-probs differ by {worst}"
    return worst


def check_stream(actor: Actor, folder: Path) -> None:
    """Bit for bit what the folder holds, in the plan's order: everything on rank 0, elsewhere the stage's own."""
    grid = actor.grid
    plan = {info.name: (info.shape, info.dtype) for info in actor.tensor_plan()}
    parallel = grid.parallel
    for row in rows(actor.spec):
        stage = stage_of(row, actor.spec, pipeline=parallel.pipeline, interleave=parallel.interleave)
        if not grid.is_main and stage != grid.pp_rank:
            for name in row.hf:
                del plan[name]
    seen = []
    with SafetensorsFolder(folder) as source:
        for name, tensor in actor.hf_tensors():
            assert (tuple(tensor.shape), tensor.dtype) == plan[name], name
            assert torch.equal(tensor.cpu(), source.read(name, tuple(tensor.shape), None, 0, 0)), name
            seen.append(name)
        assert seen == list(plan)
        assert not grid.is_main or set(seen) == source.names


def check_folder(actor: Actor, folder: Path, output: Path) -> None:
    """A saved folder holds the same tensors, and what comes with them byte for byte."""
    actor.save_hf(output, max_shard_size="100KB")
    dist.barrier(group=actor.grid.cpu_group)
    for name in COMPANIONS:
        assert (output / name).read_bytes() == (folder / name).read_bytes(), name
    with SafetensorsFolder(folder) as old, SafetensorsFolder(output) as new:
        assert old.names == new.names
        for info in actor.tensor_plan():
            a, b = (side.read(info.name, info.shape, None, 0, 0) for side in (old, new))
            assert a.dtype == b.dtype
            assert torch.equal(a, b), info.name


def check_layout(work: Path, name: str, kinds: list[str], grid: RankGrid) -> None:
    dtypes: tuple[tuple[str, Literal["float32", "bfloat16"]], ...] = (("", "float32"), ("-bf16", "bfloat16"))
    for kind in kinds:
        for suffix, dtype in dtypes:
            folder = work / (kind + suffix)
            actor = Actor.build(folder, dtype=dtype, grid=grid, optimizer=None)
            check_stream(actor, folder)
            if dtype == "float32":
                print(f"{name} {kind}: log-probs differ by {check_logprobs(actor, work / f'{kind}.pt'):.1e}")
    check_folder(actor, folder, work / f"saved-{name}")


def main() -> None:
    work = Path(sys.argv[1])
    layouts: list[dict[str, Any]] = json.loads(sys.argv[2])
    for layout in layouts:
        os.environ["MASTER_PORT"] = str(layout["port"])
        section = ParallelSection(**layout["parallel"], device="cpu", collective_timeout_s=60)
        grid = init_grid(section, seed=1)
        check_layout(work, layout["name"], layout["kinds"], grid)
        dist.barrier(group=grid.cpu_group)
        close_grid()


if __name__ == "__main__":
    main()
