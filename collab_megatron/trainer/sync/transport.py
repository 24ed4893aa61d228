"""What the ways to an engine have in common: the protocol of a transport, and who of the trainer hands buckets over."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Protocol
from urllib.parse import urlsplit

import torch.distributed as dist
from torch import Tensor

from collab_megatron.engine.control import BucketTensors, EngineControl
from collab_megatron.trainer.actor.grid import RankGrid
from collab_megatron.trainer.convert.buckets import Bucket
from collab_megatron.trainer.sync.servers import Receivers
from collab_megatron.wire.roster import EngineEntry


class Transport(Protocol):
    """How a packed bucket gets from the rank that packed it into the servers. One object per trainer rank.

    `prepare` and `offer` may raise Abandoned (board.py) and RunError.
    """

    offers: bool  # whether this rank hands buckets over; else it only takes part in gathering them
    one_by_one: bool  # whether the tensors of a bucket that is `apart` travel one by one; else packed into `buffers`
    in_turn: bool  # whether a bucket is on its way only once the one before has arrived
    every_stage: bool  # whether it needs the buckets of the other stages, too

    def prepare(self, members: Sequence[EngineEntry], receivers: Receivers | None) -> None:
        """Make whatever ties trainer and servers together. Every rank; `receivers` on rank 0."""
        ...

    def buffers(self, num_bytes: int, count: int) -> list[Tensor]:
        """Room for `count` packed buckets, uint8 [num_bytes] each."""
        ...

    def offer(self, bucket: Bucket, tensors: Sequence[Tensor]) -> Callable[[], bool]:
        """Start handing a bucket over: its packed bytes as the only one, or its tensors one by one. What is returned
        tells when they may be written again."""
        ...

    def receive(self, control: EngineControl, entry: EngineEntry, bucket: Bucket, weight_version: int | None) -> None:
        """Rank 0: have one server take the bucket. Blocks until it has loaded it."""
        ...

    def taken(self, bucket: Bucket) -> None:
        """Rank 0: all servers have loaded the bucket."""
        ...

    def reset(self) -> None:
        """After a failed attempt: nothing may wait for this side any more."""
        ...

    def leave(self, receivers: Receivers) -> None:
        """Rank 0, at the end of a run: untie servers that outlive it."""
        ...


def is_stage_sender(grid: RankGrid) -> bool:
    """Whether this rank speaks for its pipeline stage: the ranks that share a pipeline with rank 0 do."""
    return (grid.pp_size == 1 and grid.is_main) or dist.get_process_group_ranks(grid.pp_group)[0] == 0


def bucket_tensors(bucket: Bucket) -> BucketTensors:
    return BucketTensors(
        names=[info.name for info in bucket.tensors],
        dtypes=[str(info.dtype).removeprefix("torch.") for info in bucket.tensors],
        shapes=[list(info.shape) for info in bucket.tensors],
    )


def address_seen_by(members: Sequence[EngineEntry]) -> str:
    """This machine's address as the servers reach it: loopback where all of them are here."""
    hosts = [urlsplit(member.url).hostname or "127.0.0.1" for member in members]
    away = next((host for host in hosts if not socket.gethostbyname(host).startswith("127.")), None)
    if away is None:
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((away, 9))  # sends nothing: asks the kernel which interface leads there
        return str(probe.getsockname()[0])
