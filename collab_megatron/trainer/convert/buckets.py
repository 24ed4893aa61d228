"""A Megatron model as flat buckets of whole Hugging Face tensors, for export and weight sync.

A bucket is a run of table rows of one pipeline stage. The parts on other ranks are gathered in one collective per
bucket, so the cost does not grow with the number of tensors. SGLang has the same layout:
sglang/srt/weight_sync/tensor_bucket.py (bytes of the tensors, end to end, in order).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from collab_megatron.model.spec import ModelSpec
from collab_megatron.model.tables import ParameterRow, rows
from collab_megatron.trainer.convert.placement import expert_owner, local_parameters, stage_of
from collab_megatron.trainer.convert.reshape import gather, parts_of

if TYPE_CHECKING:
    from collab_megatron.trainer.actor.grid import RankGrid


APART_BYTES = 4 * 2**20
"""From this average tensor size on, saving the copy gains more than one message per tensor costs."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the stream."""

    name: str  # Hugging Face name
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Bucket:
    """Consecutive table rows of one pipeline stage; their Hugging Face tensors lie end to end."""

    number: int  # index in the plan, from 0
    stage: int
    rows: tuple[ParameterRow, ...]
    tensors: tuple[TensorInfo, ...]
    apart: bool = False  # large tensors that are whole on one rank: they may be sent one by one, unpacked

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)

    def views(self, flat: Tensor) -> Iterator[tuple[TensorInfo, Tensor]]:
        """The tensors as views of `flat`, uint8 [at least num_bytes]."""
        start = 0
        for info in self.tensors:
            end = start + info.num_bytes
            yield info, flat[start:end].view(info.dtype).view(info.shape)
            start = end


def row_tensors(row: ParameterRow, spec: ModelSpec, dtype: torch.dtype) -> tuple[TensorInfo, ...]:
    """The Hugging Face tensors of a row."""
    return tuple(
        TensorInfo(name, tuple(spec.dims[dim] for dim in dims), dtype)
        for name, dims in zip(row.hf, row.shapes, strict=True)
    )


def tensor_plan(spec: ModelSpec, dtype: torch.dtype) -> list[TensorInfo]:
    """Names, shapes and dtypes in streaming order; needs no model. Without lm_head if it is tied."""
    return [tensor for row in rows(spec) for tensor in row_tensors(row, spec, dtype)]


def bucket_plan(
    spec: ModelSpec, dtype: torch.dtype, *, pipeline: int, interleave: int, bucket_bytes: int, cut: bool = True
) -> list[Bucket]:
    """Split the table into buckets of at most `bucket_bytes`; a larger row gets its own bucket. Pure.

    `cut`: tensor or expert parallelism divides the model. If not, a row of more than half a bucket also gets its own
    bucket, so that it can be sent without a copy whatever the size of its neighbors. The fused parts of a row (q, k, v;
    gate, up) stay together.
    """
    runs: list[tuple[int, list[ParameterRow], list[TensorInfo]]] = []
    room = 0  # bytes left in the last bucket
    for row in rows(spec):
        stage = stage_of(row, spec, pipeline=pipeline, interleave=interleave)
        tensors = row_tensors(row, spec, dtype)
        num_bytes = sum(tensor.num_bytes for tensor in tensors)
        alone = not cut and num_bytes > bucket_bytes / 2
        if not runs or runs[-1][0] != stage or num_bytes > room or alone:
            runs.append((stage, [], []))
            room = bucket_bytes
        runs[-1][1].append(row)
        runs[-1][2].extend(tensors)
        room = 0 if alone else room - num_bytes
    return [
        Bucket(
            number,
            stage,
            tuple(some),
            tuple(tensors),
            apart=not cut and sum(tensor.num_bytes for tensor in tensors) >= APART_BYTES * len(tensors),
        )
        for number, (stage, some, tensors) in enumerate(runs)
    ]


def is_cut(spec: ModelSpec, grid: RankGrid) -> bool:
    """Whether tensor or expert parallelism divides the model."""
    return grid.tp_size > 1 or (spec.experts > 0 and grid.ep_size > 1)


class BucketStream:
    """This rank's side of the stream. For each bucket of its stage: `gather`, then `pack`, `pieces` or `tensors`.

    Extra memory: one buffer, at most the largest bucket of this stage, and only if tensor or expert parallelism cuts
    the model. The caller owns the target of `pack`.
    """

    def __init__(self, chunks: Sequence[nn.Module], spec: ModelSpec, grid: RankGrid, plan: Sequence[Bucket]) -> None:
        self.plan = plan
        self._spec, self._grid = spec, grid
        self._parameters = local_parameters(chunks, spec, grid)
        self._gathered: Tensor | None = None  # uint8; the parts of other ranks
        self._shards: dict[str, list[Tensor]] = {}  # Megatron name -> every rank's part, for the gathered bucket

    @property
    def mine(self) -> list[Bucket]:
        """The buckets of this rank's pipeline stage."""
        return [bucket for bucket in self.plan if bucket.stage == self._grid.pp_rank]

    @property
    def gathers(self) -> bool:
        """Whether other ranks hold parts of this stage's tensors."""
        return is_cut(self._spec, self._grid)

    @torch.no_grad()
    def gather(self, bucket: Bucket) -> None:
        """Gather the parts of `bucket` on other ranks. Collective over the ranks of this stage, in the plan's order."""
        self._shards.clear()
        cut = [row for row in bucket.rows if row.cut is not None and self._grid.tp_size > 1]
        away = [row for row in bucket.rows if row.expert is not None and self._grid.ep_size > 1]
        if not cut and not away:
            return
        sizes = [self._parameters[row.megatron].nbytes for row in cut]
        experts = [sum(info.num_bytes for info in self._infos(row)) for row in away]
        tp_size = self._grid.tp_size
        shard_bytes = sum(sizes)
        room = self._room(shard_bytes * tp_size + sum(experts))
        if cut:
            every = room[: shard_bytes * tp_size].view(tp_size, shard_bytes)
            own = every[self._grid.tp_rank]
            for row, view in zip(cut, own.split(sizes), strict=True):
                view.copy_(_as_bytes(self._local(row)))
            dist.all_gather_into_tensor(every.view(-1), own, group=self._grid.tp_group)
            for row, *views in zip(cut, *(shard.split(sizes) for shard in every), strict=True):
                local = self._parameters[row.megatron]
                self._shards[row.megatron] = [view.view(local.dtype).view(local.shape) for view in views]
        self._fetch_experts(away, room[shard_bytes * tp_size :], experts)

    def _fetch_experts(self, away: list[ParameterRow], room: Tensor, sizes: list[int]) -> None:
        """One broadcast per owner: the experts of one owner stand next to each other in the table."""
        runs: list[tuple[int, int, int]] = []  # owner, first byte, end
        start = 0
        for row, size in zip(away, sizes, strict=True):
            owner = expert_owner(row, self._spec, expert_parallel=self._grid.ep_size)
            view = room[start : start + size]
            if owner == self._grid.ep_rank:
                view.copy_(_as_bytes(self._local(row)))
            infos = self._infos(row)
            rows_of_all = sum(info.shape[0] for info in infos)
            fused = view.view(infos[0].dtype).view(rows_of_all, *infos[0].shape[1:])
            self._shards[row.megatron] = [fused]
            if runs and runs[-1][0] == owner and runs[-1][2] == start:
                runs[-1] = (owner, runs[-1][1], start + size)
            else:
                runs.append((owner, start, start + size))
            start += size
        for owner, first, end in runs:
            dist.broadcast(room[first:end], group=self._grid.ep_group, group_src=owner)

    @torch.no_grad()
    def pack(self, bucket: Bucket, flat: Tensor) -> None:
        """Write the gathered bucket's tensors into `flat`, uint8 [at least num_bytes], end to end. Local."""
        targets = bucket.views(flat)
        for row in bucket.rows:
            for parts in parts_of(row, self._parts(row), self._spec):
                _, target = next(targets)
                start = 0
                for part in parts:  # one copy per rank that held a part, directly to its place
                    length = part.shape[row.cut or 0]
                    target.narrow(row.cut or 0, start, length).copy_(part)
                    start += length

    @torch.no_grad()
    def pieces(self, bucket: Bucket) -> list[Tensor]:
        """The tensors of a bucket that is `apart`, as views of this rank's parameters. q, k and v are copies, because
        the parameter groups them by key/value head. Local."""
        return [part.contiguous() for row in bucket.rows for (part,) in parts_of(row, self._parts(row), self._spec)]

    @torch.no_grad()
    def tensors(self, bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
        """The gathered bucket's (Hugging Face name, whole contiguous tensor), one at a time. Local.

        A tensor that needed no join shares memory with the model or with the buffer that the next `gather` overwrites.
        """
        for row in bucket.rows:
            yield from zip(row.hf, gather(row, self._parts(row), self._spec), strict=True)

    def free(self) -> None:
        """Free the buffer."""
        self._shards.clear()
        self._gathered = None

    def _parts(self, row: ParameterRow) -> list[Tensor]:
        return self._shards.get(row.megatron) or [self._local(row)]

    def _local(self, row: ParameterRow) -> Tensor:
        return self._parameters[row.megatron].detach()

    def _infos(self, row: ParameterRow) -> tuple[TensorInfo, ...]:
        return row_tensors(row, self._spec, next(iter(self._parameters.values())).dtype)

    def _room(self, num_bytes: int) -> Tensor:
        if self._gathered is None or self._gathered.numel() < num_bytes:
            self._gathered = None  # before the larger one is made: never two at a time
            self._gathered = torch.empty(num_bytes, dtype=torch.uint8, device=self._grid.device)
        return self._gathered[:num_bytes]


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
