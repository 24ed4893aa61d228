"""One attempt to bring all weights into all servers, bucket by bucket: gather -> pack -> hand over -> load.

While a bucket travels the next one is gathered, and the engine loads one while the next is packed. Two buckets exist at
a time on a sender: one on its way, and either the next one (nothing is gathered) or what is gathered for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from collab_megatron.actor.actor import Actor
from collab_megatron.convert.buckets import Bucket, BucketStream
from collab_megatron.engine.roster import EngineEntry
from collab_megatron.errors import RunError
from collab_megatron.resharding.background import in_background
from collab_megatron.resharding.board import Abandoned, Board
from collab_megatron.resharding.checksums import ExpectedChecksums
from collab_megatron.resharding.receivers import Receivers
from collab_megatron.resharding.session import Session
from collab_megatron.resharding.transport import Transport


class Delivery(Protocol):
    """A way of bringing the weights into the servers. One object per trainer rank."""

    def deliver(
        self, members: Sequence[EngineEntry], version: int, session: Session | None, expected: ExpectedChecksums
    ) -> None:
        """Collective over all trainer ranks; `session` on rank 0. When it returns everywhere, the members hold the
        weights, as `version`, and are still paused. What this rank has sent is added to `expected`.

        Raises EnginesLost on rank 0 when servers failed; elsewhere Abandoned or RunError, whichever comes first.
        """
        ...

    def leave(self, receivers: Receivers) -> None:
        """Rank 0, at the end of a run: untie servers that outlive it."""
        ...


class BucketDelivery:
    """Through a transport that takes flat buckets."""

    def __init__(self, actor: Actor, board: Board, transport: Transport, bucket_bytes: int) -> None:
        self._actor, self._board, self._transport = actor, board, transport
        self._bucket_bytes = bucket_bytes

    def deliver(
        self, members: Sequence[EngineEntry], version: int, session: Session | None, expected: ExpectedChecksums
    ) -> None:
        try:
            self._transport.prepare(members, session.receivers if session else None)
            if session:
                session.open(on_failure=self._board.abandon)
        except (Abandoned, RunError):
            self._give_up()
            raise
        stream = self._actor.bucket_stream(self._bucket_bytes)
        loading = None
        if session:
            loading = in_background("loading", self._load_all, session.receivers, stream.plan, version)
        failure: Exception | None = None
        try:
            self._send_all(stream, expected)
        except (Abandoned, RunError) as error:
            failure = error
            self._give_up()
        if loading is not None:
            loading.result()  # each of its calls has a deadline; its word on what failed is the better one
        if failure is not None:
            raise failure
        if session:
            session.close()

    def leave(self, receivers: Receivers) -> None:
        self._transport.leave(receivers)

    def _give_up(self) -> None:
        self._board.abandon()
        self._transport.reset()

    def _load_all(self, receivers: Receivers, plan: Sequence[Bucket], version: int) -> None:
        """Rank 0: tell the servers of one bucket after the other, whichever stage it comes from."""
        for bucket in plan:
            last = bucket.number == len(plan) - 1
            receivers.each(
                f"bucket {bucket.number} of {len(plan)} (stage {bucket.stage}, from {bucket.tensors[0].name})",
                lambda control, entry, bucket=bucket, last=last: self._transport.receive(  # type: ignore[misc]
                    control, entry, bucket, version if last else None
                ),
                on_failure=self._board.abandon,
            )
            self._transport.taken(bucket)

    def _send_all(self, stream: BucketStream, expected: ExpectedChecksums) -> None:
        """Hand over what is this rank's to hand over. After a failure it goes on gathering, since its neighbours wait
        for it there, and raises at the end."""
        grid, transport = self._actor.grid, self._transport
        buckets = stream.plan if transport.every_stage else stream.mine
        flats: list[Tensor] = []
        if transport.offers and buckets:
            largest = max(bucket.num_bytes for bucket in buckets)
            flats = transport.buffers(largest, 1 if stream.gathers else 2)
        sent: Callable[[], bool] = _nothing
        failure: Exception | None = None
        for count, bucket in enumerate(buckets):
            mine = bucket.stage == grid.pp_rank
            if mine:
                stream.gather(bucket)
            if not transport.offers or (failure and not transport.every_stage):
                continue
            flat = flats[count % len(flats)]
            try:
                if len(flats) == 1:
                    self._board.wait(sent, f"handing over the bucket before {bucket.number}")
                if mine:
                    stream.pack(bucket, flat)
                if transport.every_stage:
                    dist.broadcast(flat[: bucket.num_bytes], group=grid.pp_group, group_src=bucket.stage)
                if failure:
                    continue
                self._board.wait(sent, f"handing over the bucket before {bucket.number}")
                sent = self._hand_over(bucket, flat)
            except (Abandoned, RunError) as error:
                failure, sent = error, _nothing
                self._give_up()
                continue
            if mine:
                for name, tensor in stream.tensors(bucket):  # while the bucket travels
                    expected.add(name, tensor)
        stream.free()
        if failure is not None:
            raise failure
        self._board.wait(sent, "handing over the last bucket")

    def _hand_over(self, bucket: Bucket, flat: Tensor) -> Callable[[], bool]:
        return self._transport.offer(bucket, flat)


def _nothing() -> bool:
    return True
