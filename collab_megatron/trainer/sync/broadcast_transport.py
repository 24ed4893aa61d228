"""Transport `broadcast`: per pipeline stage a process group of its sender and all engine ranks; NCCL or gloo.

The sender must be rank 0 of its group (sglang's `update_weights_from_distributed` receives from there), so every stage
has a group of its own, and sends its own layers.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from collab_megatron.engine.control import EngineControl
from collab_megatron.errors import RunError
from collab_megatron.trainer.actor.grid import RankGrid
from collab_megatron.trainer.convert.buckets import Bucket
from collab_megatron.trainer.sync.attempt import Board
from collab_megatron.trainer.sync.servers import Receivers
from collab_megatron.trainer.sync.threads import in_background
from collab_megatron.trainer.sync.transport import address_seen_by, bucket_tensors, is_stage_sender
from collab_megatron.trainer.sync.update_group import UpdateGroup
from collab_megatron.wire.roster import EngineEntry


@dataclass(frozen=True)
class _Place:
    """Where the servers find a stage's group."""

    stage: int
    name: str
    host: str
    port: int
    world_size: int


class BroadcastTransport:
    """Groups are kept from sync to sync, and made anew when the servers are others than before."""

    def __init__(self, grid: RankGrid, board: Board, talk: dist.ProcessGroup, *, timeout_s: float) -> None:
        """`talk`: a gloo group of all trainer ranks."""
        self._grid, self._board, self._talk, self._timeout_s = grid, board, talk, timeout_s
        self._members: tuple[EngineEntry, ...] = ()
        self._offsets: dict[EngineEntry, int] = {}  # a server's first rank in every group
        self._places: dict[int, _Place] = {}
        self._group: UpdateGroup | None = None
        self.offers = is_stage_sender(grid)
        self.one_by_one = True
        self.in_turn = True
        self.every_stage = False

    def prepare(self, members: Sequence[EngineEntry], receivers: Receivers | None) -> None:
        if tuple(members) == self._members:
            return
        self.reset()
        offset = 1
        for member in members:
            self._offsets[member] = offset
            offset += member.ranks
        place = None
        backend = self._grid.backend.process_group
        if self.offers:
            # a name of this attempt alone: a server may still hold the group of one that failed
            name = f"collab_megatron_{uuid.uuid4().hex[:12]}"
            host = address_seen_by(members)
            self._group = UpdateGroup(name, host=host, world_size=offset, backend=backend, timeout_s=self._timeout_s)
            place = _Place(self._grid.pp_rank, name, host, self._group.port, offset)
        places: list[_Place | None] = [None] * self._grid.world_size
        dist.all_gather_object(places, place, group=self._talk)
        self._places = {place.stage: place for place in places if place is not None}
        inviting = in_background("inviting", self._invite, receivers) if receivers is not None else None
        try:
            if self._group is not None:
                self._group.join(self._board)
        finally:
            if inviting is not None:  # what it says is the better reason
                inviting.result(2 * self._timeout_s)
        self._members = tuple(members)

    def _invite(self, receivers: Receivers) -> None:
        """Have all servers join the groups, in the order of the stages: a server can join one at a time."""
        for _, place in sorted(self._places.items()):
            receivers.each(
                "init_weights_update_group",
                lambda control, entry, place=place: control.init_update_group(  # type: ignore[misc]
                    address=place.host,
                    port=place.port,
                    rank_offset=self._offsets[entry],
                    world_size=place.world_size,
                    group_name=place.name,
                    backend=self._grid.backend.process_group,
                ),
                on_failure=self._board.abandon,
            )

    def buffers(self, num_bytes: int, count: int) -> list[Tensor]:
        return [torch.empty(num_bytes, dtype=torch.uint8, device=self._grid.device) for _ in range(count)]

    def offer(self, bucket: Bucket, tensors: Sequence[Tensor]) -> Callable[[], bool]:
        assert self._group is not None, "offer before prepare"
        assert self._group.group is not None, "offer before the group was joined"
        works = [dist.broadcast(tensor, src=0, group=self._group.group, async_op=True) for tensor in tensors]

        def sent() -> bool:
            if not all(work.is_completed() for work in works):
                return False
            try:
                for work in works:
                    work.wait()
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise RunError(
                    f"trainer rank {self._grid.rank} could not send bucket {bucket.number}: {reason}"
                ) from error
            return True

        return sent

    def receive(self, control: EngineControl, entry: EngineEntry, bucket: Bucket, weight_version: int | None) -> None:
        control.receive_bucket(
            bucket_tensors(bucket),
            group_name=self._places[bucket.stage].name,
            packed=not bucket.apart,
            weight_version=weight_version,
        )

    def taken(self, bucket: Bucket) -> None:
        return

    def reset(self) -> None:
        """Close the group: servers that wait in it wake up with an error."""
        if self._group is not None:
            self._group.close()
        self._group, self._members, self._offsets, self._places = None, (), {}, {}

    def leave(self, receivers: Receivers) -> None:
        """Rank 0: ask the servers to leave the groups too; those we started end anyway."""
        for place in self._places.values():
            for member in self._members:
                if not member.managed:
                    receivers.control(member).destroy_update_group(place.name)
