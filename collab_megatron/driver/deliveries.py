"""What a shard has handed to the trainer, in the journal before it is sent: asked again, it says the same again."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from collab_megatron.driver.forest import Tree
from collab_megatron.driver.protocol import Answer
from collab_megatron.journal.store import Journal


class Delivered(msgspec.Struct):
    """One step's batch of one shard."""

    trees: list[tuple[int, int, bool]]  # step, slot, whether another tree was begun in its place
    answer: Answer
    lines: list[bytes]  # of the record; none where record.every leaves the step out


class Deliveries:
    """Those of one shard among `count`. Also holds the newest in memory: with replay off the journal gives none."""

    def __init__(self, journal: Journal, index: int, count: int) -> None:
        self._journal = journal
        self._key = count * 4096 + index  # dealt out anew, the batches are others
        self._newest: tuple[int, Delivered] | None = None

    def get(self, step: int) -> Delivered | None:
        """The batch of `step` as it was delivered."""
        if self._newest is not None and self._newest[0] == step:
            return self._newest[1]
        content = self._journal.delivered(self._key, step)
        return None if content is None else msgspec.msgpack.decode(content, type=Delivered)

    def put(self, step: int, trees: Sequence[Tree], answer: Answer, lines: Sequence[bytes]) -> None:
        """Durable when it returns."""
        seats = [(tree.seat.step, tree.seat.slot, tree.replaced) for tree in trees]
        content = Delivered(seats, answer, list(lines))
        self._journal.record_delivery(self._key, step, msgspec.msgpack.encode(content))
        self._newest = step, content

    def remove(self, step: int) -> None:
        """As if the batch of `step` had never been delivered."""
        self._journal.remove_delivery(self._key, step)
        self._newest = None

    def trees_around(self, step: int, lookback: int) -> tuple[dict[tuple[int, int], bool], int]:
        """The trees of the batches from `step - lookback` on, as forest.Delivered; and the first step from `step` on of
        which the journal knows no batch."""
        trees: dict[tuple[int, int], bool] = {}
        at = max(0, step - lookback)
        while True:
            batch = self.get(at)
            if batch is None and at >= step:
                return trees, at
            if batch is not None:
                trees |= {(of, slot): replaced for of, slot, replaced in batch.trees}
            at += 1
