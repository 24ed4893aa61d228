"""What the transports broadcast and ipc share: weights in flat buckets, the next one packed while the last one travels.

Every rank gathers its stage's buckets in the plan's order, packs them and sends them. A second thread of rank 0 tells
the servers to load one bucket after the other. Two buckets exist at a time: one in flight, and either the next one or,
where the model is cut, what is gathered for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from functools import partial

import torch.distributed as dist
from torch import Tensor

from collab_megatron.engine.control import EngineControl
from collab_megatron.errors import RunError
from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.actor.grid import RankGrid
from collab_megatron.trainer.convert.buckets import Bucket, BucketStream
from collab_megatron.trainer.sync.attempt import Abandoned, Attempt
from collab_megatron.trainer.sync.proof.checksums import ExpectedChecksums
from collab_megatron.trainer.sync.servers import CallToAll, SyncServers
from collab_megatron.trainer.sync.threads import in_background
from collab_megatron.wire.roster import EngineEntry


class BucketTransport(ABC):
    """A Transport. Subclasses add how a packed bucket gets from the rank that packed it into the servers; their
    `_connect` and `_send` may raise Abandoned and RunError."""

    sends: bool  # whether this rank sends buckets; else it only takes part in gathering them
    unpacked: bool  # whether the tensors of a bucket that is `apart` travel one by one; else all are packed
    one_at_a_time: bool  # whether a bucket is sent only once the one before has arrived
    every_stage: bool  # whether this rank sends the buckets of the other pipeline stages, too
    renewed: bool = False  # whether a sent buffer is given up for a new one, instead of being written again

    def __init__(self, actor: Actor, servers: SyncServers | None, bucket_bytes: int) -> None:
        """`servers` on rank 0."""
        self._actor, self._grid, self._servers, self._bucket_bytes = actor, actor.grid, servers, bucket_bytes
        self._kept: list[Tensor] = []  # buffers, on CPU from sync to sync: new memory costs more than the copy into it

    @abstractmethod
    def _connect(self, attempt: Attempt) -> None:
        """Connect trainer and servers. Collective over all trainer ranks."""

    @abstractmethod
    def _buffers(self, num_bytes: int, count: int) -> list[Tensor]:
        """`count` buffers for packed buckets, uint8 [num_bytes] each."""

    @abstractmethod
    def _send(self, attempt: Attempt, bucket: Bucket, tensors: Sequence[Tensor]) -> Callable[[], bool]:
        """Start sending a bucket: its packed bytes as the only tensor, or its tensors one by one. The function returned
        tells whether they may be written again."""

    @abstractmethod
    def _load(
        self, attempt: Attempt, bucket: Bucket, version: int | None, control: EngineControl, entry: EngineEntry
    ) -> None:
        """Rank 0: have one server load the bucket, and wait until it has. `version` comes with the last bucket."""

    @abstractmethod
    def _loaded(self, attempt: Attempt, bucket: Bucket) -> None:
        """Rank 0: all servers have loaded the bucket."""

    @abstractmethod
    def _disconnect(self) -> None:
        """After a failed attempt: no server may go on waiting for this rank."""

    @abstractmethod
    def close(self) -> None:
        """As in Transport."""

    def deliver(self, attempt: Attempt, version: int, expected: ExpectedChecksums) -> None:
        """As in Transport."""
        servers = self._servers
        failure = self._tried(attempt, partial(self._begin, attempt))
        stream = self._actor.bucket_stream(self._bucket_bytes)
        loading = None
        if servers and failure is None:
            loading = in_background("loading", self._load_all, servers, attempt, stream.plan, version)
        try:
            self._send_all(attempt, stream, expected, failure)
        except (Abandoned, RunError) as error:
            failure = error
            self._give_up(attempt)
        # each of the loading calls has a deadline; an error of theirs names the server, so it comes first
        if loading and (load_error := loading.exception()) and not (failure and isinstance(load_error, Abandoned)):
            raise load_error
        if failure is not None:
            raise failure
        if servers:
            servers.end_update()

    def _begin(self, attempt: Attempt) -> None:
        """Connect; rank 0 also has the servers pause and expect weights."""
        self._connect(attempt)
        if self._servers:
            self._servers.pause(on_failure=attempt.abandon)
            self._servers.begin_update(on_failure=attempt.abandon)

    def _give_up(self, attempt: Attempt) -> None:
        attempt.abandon()
        self._disconnect()

    def _load_all(self, servers: SyncServers, attempt: Attempt, plan: Sequence[Bucket], version: int) -> None:
        """Have the servers load one bucket after the other, whichever stage it comes from.

        The call for a bucket is made once the one before has left this rank, while the servers still load that one:
        earlier, the two calls could overtake each other.
        """
        calls: list[tuple[Bucket, CallToAll[None]]] = []
        for bucket in plan:
            if calls:
                previous, newest = calls[-1]
                settled = newest.settled()
                wait([attempt.sent(previous.number), settled], return_when=FIRST_COMPLETED)
                while len(calls) > (0 if settled.done() else 1):
                    self._finish(attempt, *calls.pop(0))
            is_last = bucket.number == len(plan) - 1
            what = f"bucket {bucket.number} of {len(plan)} (stage {bucket.stage}, from {bucket.tensors[0].name})"
            load = partial(self._load, attempt, bucket, version if is_last else None)
            calls.append((bucket, servers.start(what, load)))
        for call in calls:
            self._finish(attempt, *call)

    def _finish(self, attempt: Attempt, bucket: Bucket, call: CallToAll[None]) -> None:
        call.results(attempt.abandon)
        self._loaded(attempt, bucket)

    def _send_all(
        self, attempt: Attempt, stream: BucketStream, expected: ExpectedChecksums, failure: Exception | None
    ) -> None:
        """Send this rank's buckets. Collective over the ranks of a stage.

        After a failure, or with one from before, it goes on with what other ranks wait for: gathering, and where every
        rank sends all stages, handing buckets from stage to stage. It raises at the end: that failure, or Abandoned, or
        RunError naming rank and bucket.
        """
        buckets = stream.plan if self.every_stage else stream.mine
        flats = self._room(stream, buckets) if self.sends else []
        tensors: list[Tensor] = []
        in_flight = _InFlight(attempt)
        for count, bucket in enumerate(buckets):
            mine, is_packed = bucket.stage == self._grid.pp_rank, not (bucket.apart and self.unpacked)
            if mine:
                stream.gather(bucket)
            if not self.sends or (failure and not self.every_stage):
                continue
            tensors = []  # or a sent buffer would live on here
            if is_packed:
                place = count % len(flats)
                if failure is None:
                    failure = self._tried(attempt, partial(in_flight.wait_for, flats[place]))
                if failure is not None:
                    in_flight.forget()  # and renew: a server may still read them
                    if not self.every_stage:
                        continue
                if self.renewed and count >= len(flats):
                    self._renew(flats, place)
                tensors = [flats[place][: bucket.num_bytes]]
                if mine:
                    stream.pack(bucket, flats[place])
                if self.every_stage:
                    dist.broadcast(tensors[0], group=self._grid.pp_group, group_src=bucket.stage)
            else:
                tensors = stream.pieces(bucket)
            if failure is None:
                failure = self._tried(attempt, partial(self._start_sending, attempt, bucket, tensors, in_flight))
            if failure is None and mine and expected.wants(info.name for info in bucket.tensors):
                for name, tensor in stream.tensors(bucket):  # while the bucket travels
                    expected.add(name, tensor)
        stream.free()
        if failure is None:
            failure = self._tried(attempt, in_flight.wait_for_all)
        if self._grid.device.type != "cpu":  # whatever came of it: the error's traceback holds this frame
            in_flight.forget()
            tensors = []
            flats.clear()
            self._kept = []
        if failure is not None:
            raise failure

    def _start_sending(self, attempt: Attempt, bucket: Bucket, tensors: Sequence[Tensor], in_flight: _InFlight) -> None:
        if self.one_at_a_time:
            in_flight.wait_for_all()
        in_flight.add(bucket, tensors, self._send(attempt, bucket, tensors))

    def _tried(self, attempt: Attempt, call: Callable[[], None]) -> Exception | None:
        """What ended the attempt in `call`, after telling all ranks; None if nothing did."""
        try:
            call()
        except (Abandoned, RunError) as error:
            self._give_up(attempt)
            return error.with_traceback(None)  # its frames hold buffers
        return None

    def _renew(self, flats: list[Tensor], place: int) -> None:
        """A new buffer in the place of one that was sent. The old one is let go of first, so that its memory can be
        used again as soon as nobody reads it."""
        num_bytes = flats[place].numel()
        flats[place] = flats[place].new_empty(0)
        flats[place] = self._buffers(num_bytes, 1)[0]

    def _room(self, stream: BucketStream, buckets: Sequence[Bucket]) -> list[Tensor]:
        """Buffers for the buckets that are packed: two, or one where another is needed for gathering."""
        packed = [bucket.num_bytes for bucket in buckets if not (bucket.apart and self.unpacked)]
        num_bytes, count = max(packed, default=0), 1 if stream.gathers else 2
        if len(self._kept) != count or self._kept[0].numel() < num_bytes:
            self._kept = []  # before the larger ones are made
            self._kept = self._buffers(num_bytes, count)
        return self._kept


class _InFlight:
    """The buckets that are being sent: which memory must not be written yet."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._buckets: list[tuple[Bucket, Sequence[Tensor], Callable[[], bool]]] = []

    def add(self, bucket: Bucket, tensors: Sequence[Tensor], is_sent: Callable[[], bool]) -> None:
        self._buckets.append((bucket, tensors, is_sent))

    def forget(self) -> None:
        """Wait for none of them."""
        self._buckets.clear()

    def wait_for(self, flat: Tensor) -> None:
        """Wait until no bucket in flight lies in `flat`."""
        while any(tensors[0].data_ptr() == flat.data_ptr() for _, tensors, _ in self._buckets):
            self._wait_for_oldest()

    def wait_for_all(self) -> None:
        while self._buckets:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        bucket, _, is_sent = self._buckets.pop(0)
        self._attempt.wait(is_sent, f"handing over bucket {bucket.number} (from {bucket.tensors[0].name})")
        self._attempt.sent(bucket.number).set_result(True)


def is_stage_sender(grid: RankGrid) -> bool:
    """Whether this rank sends for its pipeline stage: the ranks that share a pipeline with rank 0 do."""
    return (grid.pp_size == 1 and grid.is_main) or dist.get_process_group_ranks(grid.pp_group)[0] == 0
