"""Export: a Megatron model as a stream of whole Hugging Face tensors on rank 0, one at a time.

No deadlock: all ranks walk the buckets in the same order, stages communicate only with rank 0, and gathers stay within
a stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from collab_megatron.model.spec import ModelSpec
from collab_megatron.trainer.convert.buckets import BucketStream, bucket_plan

if TYPE_CHECKING:
    from collab_megatron.trainer.actor.grid import RankGrid

EXPORT_BUCKET_BYTES = 64 * 2**20
"""Bytes that a later stage sends to rank 0 at a time."""


@torch.no_grad()
def hf_tensors(chunks: Sequence[nn.Module], spec: ModelSpec, grid: RankGrid) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, whole contiguous tensor) in the order of `tensor_plan`: on rank 0 of the grid all
    tensors, on other ranks those of their pipeline stage.

    Collective: every rank must drain the stream, each tensor within the grid's deadline. Holds at most two buckets, or
    two larger single parameters. A tensor is valid until the next one and may share memory with the model: copy it
    before you change or keep it.
    """
    dtype = next(chunks[0].parameters()).dtype
    plan = bucket_plan(
        spec,
        dtype,
        pipeline=grid.pp_size,
        interleave=grid.parallel.interleave,
        bucket_bytes=EXPORT_BUCKET_BYTES,
    )
    stream = BucketStream(chunks, spec, grid, plan)
    sends = grid.pp_rank > 0 and dist.get_process_group_ranks(grid.pp_group)[0] == 0
    for bucket in plan:
        if bucket.stage == grid.pp_rank:
            stream.gather(bucket)
            if sends:
                flat = torch.empty(bucket.num_bytes, dtype=torch.uint8, device=grid.device)
                stream.pack(bucket, flat)
                _send(flat, grid)
                del flat
            yield from stream.tensors(bucket)
        elif grid.is_main:
            flat = torch.empty(bucket.num_bytes, dtype=torch.uint8, device=grid.device)
            dist.recv(flat, group=grid.pp_group, group_src=bucket.stage)
            for info, tensor in bucket.views(flat):
                yield info.name, tensor
            del flat


def _send(flat: Tensor, grid: RankGrid) -> None:
    """Send to rank 0, from the rank of this stage in the same pipeline."""
    dist.send(flat, group=grid.pp_group, group_dst=0)
    if flat.is_cuda:
        # NCCL only queues: without this, whole buckets would pile up here for a slow reader on rank 0
        torch.cuda.current_stream(flat.device).synchronize()
