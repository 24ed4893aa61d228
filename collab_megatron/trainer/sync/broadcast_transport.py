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

from collab_megatron.engine.control import BucketTensors, EngineControl
from collab_megatron.errors import RunError
from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.convert.buckets import Bucket
from collab_megatron.trainer.sync.attempt import Abandoned, Attempt
from collab_megatron.trainer.sync.bucket_transport import BucketTransport, is_stage_sender
from collab_megatron.trainer.sync.servers import EnginesLost, SyncServers
from collab_megatron.trainer.sync.threads import in_background
from collab_megatron.trainer.sync.update_group import UpdateGroup, address_seen_by
from collab_megatron.wire.roster import EngineEntry


@dataclass(frozen=True)
class _GroupAddress:
    """Where the servers join a stage's group."""

    stage: int
    name: str
    host: str
    port: int
    world_size: int


class BroadcastTransport(BucketTransport):
    """Groups are kept from sync to sync, and made again when the members have changed."""

    unpacked = True
    one_at_a_time = True
    every_stage = False

    def __init__(
        self,
        actor: Actor,
        servers: SyncServers | None,
        bucket_bytes: int,
        *,
        all_ranks: dist.ProcessGroup,
        timeout_s: float,
    ) -> None:
        """`all_ranks`: a gloo group of the trainer. `timeout_s`: of a collective."""
        super().__init__(actor, servers, bucket_bytes)
        self.sends = is_stage_sender(self._grid)
        self._all_ranks, self._timeout_s = all_ranks, timeout_s
        self._members: tuple[EngineEntry, ...] = ()
        self._offsets: dict[EngineEntry, int] = {}  # a server's first rank in every group
        self._addresses: dict[int, _GroupAddress] = {}  # by stage
        self._group: UpdateGroup | None = None

    def _connect(self, attempt: Attempt) -> None:
        if attempt.members == self._members:
            return
        self._disconnect()
        offset = 1
        for member in attempt.members:
            self._offsets[member] = offset
            offset += member.ranks
        address = None
        backend = self._grid.backend.process_group
        if self.sends:
            # a new name each time: a server may still hold the group of an attempt that failed
            name = f"collab_megatron_{uuid.uuid4().hex[:12]}"
            host = address_seen_by(attempt.members)
            self._group = UpdateGroup(name, host=host, world_size=offset, backend=backend, timeout_s=self._timeout_s)
            address = _GroupAddress(self._grid.pp_rank, name, host, self._group.port, offset)
        addresses: list[_GroupAddress | None] = [None] * self._grid.world_size
        dist.all_gather_object(addresses, address, group=self._all_ranks)
        self._addresses = {address.stage: address for address in addresses if address is not None}
        inviting = in_background("inviting", self._invite, self._servers, attempt) if self._servers else None
        try:
            if self._group is not None:
                self._group.join(attempt)
        finally:
            if inviting is not None:  # its error names the server, so it replaces that of `join`
                inviting.result()  # each of its calls has a deadline
        self._members = attempt.members

    def _invite(self, servers: SyncServers, attempt: Attempt) -> None:
        """Have all servers join the groups, in the order of the stages: a server can join one at a time.

        They are paused before: a server that joins runs no batch, and one that owes replies, runs none and is not
        paused is given up by the pool after engine.health_timeout_s (on CPU 6 times that).
        """
        servers.pause(on_failure=attempt.abandon)
        try:
            for _, address in sorted(self._addresses.items()):
                servers.call_all(
                    "init_weights_update_group",
                    lambda control, entry, address=address: control.init_update_group(  # type: ignore[misc]
                        address=address.host,
                        port=address.port,
                        rank_offset=self._offsets[entry],
                        world_size=address.world_size,
                        group_name=address.name,
                        backend=self._grid.backend.process_group,
                    ),
                    on_failure=attempt.abandon,
                )
        except EnginesLost:
            raise
        except RunError:  # a refusal ends the run, and no tensor was sent: servers of engine.urls serve on
            servers.resume()
            raise

    def _buffers(self, num_bytes: int, count: int) -> list[Tensor]:
        return [torch.empty(num_bytes, dtype=torch.uint8, device=self._grid.device) for _ in range(count)]

    def _send(self, attempt: Attempt, bucket: Bucket, tensors: Sequence[Tensor]) -> Callable[[], bool]:
        assert self._group is not None, "sending before _connect"
        assert self._group.group is not None, "sending before the group was joined"
        # the first one connects NCCL and waits for every member before it returns, even as an async one: for a member
        # that has died, without end
        starting = in_background("starting a broadcast", self._broadcast, self._group.group, tensors)

        def is_sent() -> bool:
            if not starting.done():
                return False
            try:
                works = starting.result()
                if not all(work.is_completed() for work in works):
                    return False
                for work in works:
                    work.wait()
            except RuntimeError as error:
                # the frames hold the works, and those hold gloo's connections open: servers would go on waiting in a
                # group that was closed
                reason = str(error.with_traceback(None)).splitlines()[0]
            else:
                return True
            raise RunError(f"trainer rank {self._grid.rank} could not send bucket {bucket.number}: {reason}")

        return is_sent

    def _broadcast(self, group: dist.ProcessGroup, tensors: Sequence[Tensor]) -> list[dist.Work]:
        """On a thread of its own, which has a current device of its own. Its stream is the default one, as the main
        thread's is, so that it comes after the packing."""
        if self._grid.device.type == "cuda":
            torch.cuda.set_device(self._grid.device)
        works = [dist.broadcast(tensor, src=0, group=group, async_op=True) for tensor in tensors]
        return [work for work in works if work is not None]

    def _load(
        self, attempt: Attempt, bucket: Bucket, version: int | None, control: EngineControl, entry: EngineEntry
    ) -> None:
        tensors = BucketTensors(
            names=[info.name for info in bucket.tensors],
            dtypes=[str(info.dtype).removeprefix("torch.") for info in bucket.tensors],
            shapes=[list(info.shape) for info in bucket.tensors],
        )
        address = self._addresses.get(bucket.stage)
        if address is None:  # the other thread has disconnected since
            raise Abandoned
        control.receive_bucket(tensors, group_name=address.name, packed=not bucket.apart, weight_version=version)

    def _loaded(self, attempt: Attempt, bucket: Bucket) -> None:
        return

    def _disconnect(self) -> None:
        """Close the group: servers that wait in it wake up with an error."""
        if self._group is not None:
            self._group.close()
        self._group, self._members, self._offsets, self._addresses = None, (), {}, {}

    def close(self) -> None:
        """Ask the servers that outlive the run to leave the groups."""
        if self._servers is None:
            return
        for address in self._addresses.values():
            for member in self._members:
                if not member.managed:
                    self._servers.control(member).destroy_update_group(address.name)
