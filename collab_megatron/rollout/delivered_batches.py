"""What a shard has handed to the trainer, in the journal before it is sent: asked again, it says the same again."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import zstandard

from collab_megatron.errors import RunError
from collab_megatron.rollout.journal.store import Journal
from collab_megatron.rollout.record_lines import SCHEMA
from collab_megatron.rollout.tree_scheduler import Tree
from collab_megatron.wire.protocol import Answer


class DeliveredBatch(msgspec.Struct):
    """One step's batch of one shard."""

    trees: list[tuple[int, int, bool]]  # step, slot, whether another tree was begun in its place
    answer: Answer
    lines: bytes  # of the record, zstd; none where record.every leaves the step out
    schema: int = 0  # of the lines

    def unpacked(self) -> list[bytes]:
        """The lines."""
        return zstandard.decompress(self.lines).splitlines(keepends=True) if self.lines else []


class _Form(msgspec.Struct):
    schema: int = 0


class DeliveredBatches:
    """Those of one shard among `count`. Also holds the newest in memory: with replay off the journal gives none."""

    def __init__(self, journal: Journal, index: int, count: int) -> None:
        self._journal = journal
        self._key = count * 4096 + index  # dealt out anew, the batches are others
        self._newest: tuple[int, DeliveredBatch] | None = None

    def get(self, step: int) -> DeliveredBatch | None:
        """The batch of `step` as it was delivered. Raises RunError where another version of this package did."""
        if self._newest is not None and self._newest[0] == step:
            return self._newest[1]
        content = self._journal.delivered(self._key, step)
        if content is None:
            return None
        if msgspec.msgpack.decode(content, type=_Form).schema != SCHEMA:
            raise RunError(
                f"the journal holds the batch of step {step + 1} in the form of another version of collab_megatron: go "
                "on with the version that began the run, or set journal.path to a new file (the batch is made again)"
            )
        return msgspec.msgpack.decode(content, type=DeliveredBatch)

    def put(self, step: int, trees: Sequence[Tree], answer: Answer, lines: Sequence[bytes]) -> None:
        """Durable when it returns."""
        trees_of_batch = [(tree.id.step, tree.id.slot, tree.replaced) for tree in trees]
        packed = zstandard.ZstdCompressor(level=1).compress(b"".join(lines)) if lines else b""
        content = DeliveredBatch(trees_of_batch, answer, packed, SCHEMA)
        self._journal.record_delivery(self._key, step, msgspec.msgpack.encode(content))
        self._newest = step, content

    def remove(self, step: int) -> None:
        """As if the batch of `step` had never been delivered."""
        self._journal.remove_delivery(self._key, step)
        self._newest = None

    def trees_around(self, step: int, lookback: int) -> tuple[dict[tuple[int, int], bool], int]:
        """The trees of the batches from `step - lookback` on; the first step from `step` on that has no batch here."""
        trees: dict[tuple[int, int], bool] = {}
        at = max(0, step - lookback)
        while True:
            batch = self.get(at)
            if batch is None and at >= step:
                return trees, at
            if batch is not None:
                trees |= {(of, slot): replaced for of, slot, replaced in batch.trees}
            at += 1
