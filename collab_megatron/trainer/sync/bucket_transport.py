"""One attempt to bring all weights into all servers through a transport that takes buckets: senders and loaders."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Protocol

from collab_megatron.engine.control import EngineControl
from collab_megatron.errors import RunError
from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.convert.buckets import Bucket
from collab_megatron.trainer.sync.attempt import POLL_S, Abandoned, Board
from collab_megatron.trainer.sync.proof.checksums import ExpectedChecksums
from collab_megatron.trainer.sync.sender import Sender
from collab_megatron.trainer.sync.servers import Receivers, Round
from collab_megatron.trainer.sync.session import Session
from collab_megatron.trainer.sync.threads import in_background
from collab_megatron.trainer.sync.transport import Transport
from collab_megatron.wire.roster import EngineEntry


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
    """Rank 0 tells the servers what comes, in a thread beside its own sending."""

    def __init__(self, actor: Actor, board: Board, transport: Transport, bucket_bytes: int) -> None:
        self._actor, self._board, self._transport = actor, board, transport
        self._bucket_bytes = bucket_bytes
        self._sender = Sender(actor, board, transport, self._give_up)

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
        self._sender.sent = -1  # before the other thread reads it
        loading = None
        if session:
            loading = in_background("loading", self._load_all, session.receivers, stream.plan, version)
        failure: Exception | None = None
        try:
            self._sender.send(stream, expected)
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
        """Have the servers take one bucket after the other, whichever stage it comes from.

        The call for a bucket is made once the one before has left this rank, while the servers still load that one:
        earlier, the two calls could overtake each other.
        """
        rounds: list[tuple[Bucket, Round[None]]] = []
        for bucket in plan:
            if rounds:
                previous, newest = rounds[-1]
                while self._sender.sent < previous.number and not newest.over:
                    time.sleep(POLL_S)
                while len(rounds) > (0 if newest.over else 1):
                    self._finish_round(*rounds.pop(0))
            last = bucket.number == len(plan) - 1
            call = partial(self._receive, bucket, version if last else None)
            what = f"bucket {bucket.number} of {len(plan)} (stage {bucket.stage}, from {bucket.tensors[0].name})"
            rounds.append((bucket, receivers.begin(what, call)))
        for entry in rounds:
            self._finish_round(*entry)

    def _finish_round(self, bucket: Bucket, round_: Round[None]) -> None:
        round_.finish(self._board.abandon)
        self._transport.taken(bucket)

    def _receive(self, bucket: Bucket, version: int | None, control: EngineControl, entry: EngineEntry) -> None:
        self._transport.receive(control, entry, bucket, version)
