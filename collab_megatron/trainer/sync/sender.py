"""What one trainer rank does in a sync: gather -> pack -> hand over, bucket by bucket.

While a bucket travels the next one is gathered and packed. Two buckets exist at a time: one on its way, and either the
next one or, where the model is cut, what is gathered for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch import Tensor

from collab_megatron.errors import RunError
from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.convert.buckets import Bucket, BucketStream
from collab_megatron.trainer.sync.attempt import Abandoned, Board
from collab_megatron.trainer.sync.proof.checksums import ExpectedChecksums
from collab_megatron.trainer.sync.transport import Transport


class Sender:
    """Room for packed buckets is kept from sync to sync on CPU, where new memory costs more than the copy into it."""

    def __init__(self, actor: Actor, board: Board, transport: Transport, give_up: Callable[[], None]) -> None:
        """`give_up` tells everybody that this attempt has failed."""
        self._actor, self._board, self._transport, self._give_up = actor, board, transport, give_up
        self._kept: list[Tensor] = []
        self.sent = -1  # number of the newest bucket that has left this rank; read by another thread

    def send(self, stream: BucketStream, expected: ExpectedChecksums) -> None:
        """Hand over this rank's buckets of the stream. Collective over the ranks of a stage.

        After a failure it goes on gathering, since its neighbours wait for it there, and raises at the end: Abandoned,
        or RunError naming rank and bucket.
        """
        grid, transport = self._actor.grid, self._transport
        buckets = stream.plan if transport.every_stage else stream.mine
        flats = self._room(stream, buckets) if transport.offers else []
        way = _Way(self._board, self, transport.in_turn)
        failure: Exception | None = None
        for count, bucket in enumerate(buckets):
            mine = bucket.stage == grid.pp_rank
            if mine:
                stream.gather(bucket)
            if not transport.offers or (failure and not transport.every_stage):
                continue
            try:
                if bucket.apart and transport.one_by_one:
                    tensors = stream.pieces(bucket)
                else:
                    flat = flats[count % len(flats)]
                    way.clear(flat)
                    tensors = [flat[: bucket.num_bytes]]
                    if mine:
                        stream.pack(bucket, flat)
                    if transport.every_stage:
                        dist.broadcast(tensors[0], group=grid.pp_group, group_src=bucket.stage)
                if failure is None:
                    way.put(bucket, tensors, transport.offer)
            except (Abandoned, RunError) as error:
                failure = error
                self._give_up()
                continue
            if mine and expected.wants(info.name for info in bucket.tensors):
                for name, tensor in stream.tensors(bucket):  # while the bucket travels
                    expected.add(name, tensor)
        stream.free()
        if failure is not None:
            raise failure
        way.clear(None)
        if grid.device.type != "cpu":
            self._kept = []

    def _room(self, stream: BucketStream, buckets: Sequence[Bucket]) -> list[Tensor]:
        """Buffers for whatever has to be packed: two, or one where another is needed for gathering."""
        packed = [bucket.num_bytes for bucket in buckets if not (bucket.apart and self._transport.one_by_one)]
        num_bytes, count = max(packed, default=0), 1 if stream.gathers else 2
        if len(self._kept) != count or self._kept[0].numel() < num_bytes:
            self._kept = []
            self._kept = self._transport.buffers(num_bytes, count)
        return self._kept


class _Way:
    """The buckets on their way: which memory may be written again."""

    def __init__(self, board: Board, sender: Sender, in_turn: bool) -> None:
        self._board, self._sender, self._in_turn = board, sender, in_turn
        self._under_way: list[tuple[Bucket, Sequence[Tensor], Callable[[], bool]]] = []

    def put(
        self, bucket: Bucket, tensors: Sequence[Tensor], offer: Callable[[Bucket, Sequence[Tensor]], Callable[[], bool]]
    ) -> None:
        if self._in_turn:
            self.clear(None)
        self._under_way.append((bucket, tensors, offer(bucket, tensors)))

    def clear(self, flat: Tensor | None) -> None:
        """Wait until nothing on its way lies in `flat`; None: until nothing is on its way."""
        start = flat.data_ptr() if flat is not None else None
        while any(start is None or used[0].data_ptr() == start for _, used, _ in self._under_way):
            bucket, _, sent = self._under_way.pop(0)
            self._board.wait(sent, f"handing over bucket {bucket.number} (from {bucket.tensors[0].name})")
            self._sender.sent = bucket.number
