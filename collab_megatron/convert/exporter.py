"""A Megatron model as a stream of whole Hugging Face tensors, one at a time; and the stream's plan without weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from collab_megatron.convert.reshape import gather
from collab_megatron.convert.spec import ModelSpec
from collab_megatron.convert.tables import canonical_name, rows

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
def hf_tensors(model: nn.Module, spec: ModelSpec, grid: RankGrid) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, whole contiguous tensor) on every rank, in the order of `tensor_plan`.

    Collective over grid.tp_group: every rank must drain the stream. At most one Megatron parameter is held whole at a
    time. A yielded tensor may share memory with the model where nothing was gathered: copy before changing it.
    """
    parameters = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
    for row in rows(spec):
        local = parameters[row.megatron].detach()
        if grid.tp_size == 1 or row.cut is None:
            shards = [local]
        else:
            shards = [torch.empty_like(local) for _ in range(grid.tp_size)]
            dist.all_gather(shards, local.contiguous(), group=grid.tp_group)
        yield from zip(row.hf, gather(row, shards, spec), strict=True)
