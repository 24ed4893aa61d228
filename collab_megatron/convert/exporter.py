"""A Megatron model as a stream of whole Hugging Face tensors, one at a time; and the stream's plan without weights.

One stream serves the export of a model folder and the weight sync. Rows come in the table's order, stage by stage:
inside a stage a row is gathered over tensor- or expert-parallel ranks; then it goes point to point to rank 0. No two
ranks can wait for each other: every rank walks the rows in the same order, stages meet only at rank 0, and what a stage
gathers waits for nobody outside that stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from collab_megatron.convert.place import expert_owner, local_parameters, stage_of
from collab_megatron.convert.reshape import gather
from collab_megatron.convert.spec import ModelSpec
from collab_megatron.convert.tables import Row, rows

if TYPE_CHECKING:
    from collab_megatron.actor.grid import RankGrid


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the stream."""

    name: str  # Hugging Face name
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def tensor_plan(spec: ModelSpec, dtype: torch.dtype) -> list[TensorInfo]:
    """Names, shapes and dtypes in the order of `hf_tensors`, known without a model. Tied: no lm_head."""
    return [
        TensorInfo(name, tuple(spec.dims[dim] for dim in dims), dtype)
        for row in rows(spec)
        for name, dims in zip(row.hf, row.shapes, strict=True)
    ]


@torch.no_grad()
def hf_tensors(chunks: Sequence[nn.Module], spec: ModelSpec, grid: RankGrid) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, whole contiguous tensor) in the order of `tensor_plan`: all of them on rank 0 of the
    grid, on every other rank those of its pipeline stage.

    Collective: every rank must drain the stream, each tensor within the grid's deadline. At most one Megatron parameter
    is held whole at a time. A yielded tensor may share memory with the model where nothing was gathered, and is valid
    until the next one: copy before changing or keeping it.
    """
    parameters = local_parameters(chunks, spec, grid)
    dtype = next(iter(parameters.values())).dtype
    sends = grid.pp_rank > 0 and dist.get_process_group_ranks(grid.pp_group)[0] == 0
    for row in rows(spec):
        stage = stage_of(row, spec, pipeline=grid.pp_size, interleave=grid.parallel.interleave)
        if stage == grid.pp_rank:
            for name, tensor in zip(row.hf, _whole(row, parameters, spec, grid, dtype), strict=True):
                if sends:
                    _send(tensor, grid)
                yield name, tensor
        elif grid.is_main:
            for name, dims in zip(row.hf, row.shapes, strict=True):
                tensor = torch.empty([spec.dims[dim] for dim in dims], dtype=dtype, device=grid.device)
                dist.recv(tensor, group=grid.pp_group, group_src=stage)
                yield name, tensor


def _whole(
    row: Row, parameters: Mapping[str, Tensor], spec: ModelSpec, grid: RankGrid, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """The row's whole Hugging Face tensors on every rank of its stage: gathered over tensor-parallel ranks where it is
    cut, sent by its owner where it is an expert's. Collective over those groups."""
    if row.expert is not None and grid.ep_size > 1:
        owner = expert_owner(row, spec, expert_parallel=grid.ep_size)
        if owner == grid.ep_rank:
            value = parameters[row.megatron].detach()
        else:
            first, *_ = shapes = [[spec.dims[dim] for dim in dims] for dims in row.shapes]
            value = torch.empty(sum(shape[0] for shape in shapes), *first[1:], dtype=dtype, device=grid.device)
        dist.broadcast(value, group=grid.ep_group, group_src=owner)
        return gather(row, [value], spec)
    local = parameters[row.megatron].detach()
    assert local.dtype == dtype, f"{row.megatron} is {local.dtype}, the model {dtype}"
    if grid.tp_size == 1 or row.cut is None:
        return gather(row, [local], spec)
    shards = [torch.empty_like(local) for _ in range(grid.tp_size)]
    dist.all_gather(shards, local.contiguous(), group=grid.tp_group)
    return gather(row, shards, spec)


def _send(tensor: Tensor, grid: RankGrid) -> None:
    """To rank 0, from the rank of this stage that shares a pipeline with it."""
    dist.send(tensor, group=grid.pp_group, group_dst=0)
    if tensor.is_cuda:
        # NCCL only queues: without this a slow reader on rank 0 would let whole tensors pile up here
        torch.cuda.current_stream(tensor.device).synchronize()
