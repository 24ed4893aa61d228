"""A Megatron model as a stream of whole Hugging Face tensors on rank 0, one at a time: the bucket stream, unpacked.

No two ranks can wait for each other: every rank walks the buckets in the same order, stages meet only at rank 0, and
what a stage gathers waits for nobody outside that stage.
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
"""What a later stage sends to rank 0 at a time."""


@torch.no_grad()
def hf_tensors(chunks: Sequence[nn.Module], spec: ModelSpec, grid: RankGrid) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, whole contiguous tensor) in the order of `tensor_plan`: all of them on rank 0 of the
    grid, on every other rank those of its pipeline stage.

    Collective: every rank must drain the stream, each tensor within the grid's deadline. At most two buckets (or single
    parameters, where those are larger) are held at a time. A yielded tensor may share memory with the model where
    nothing was gathered, and is valid until the next one: copy before changing or keeping it.
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
    """To rank 0, from the rank of this stage that shares a pipeline with it."""
    dist.send(flat, group=grid.pp_group, group_dst=0)
    if flat.is_cuda:
        # NCCL only queues: without this a slow reader on rank 0 would let whole buckets pile up here
        torch.cuda.current_stream(flat.device).synchronize()
