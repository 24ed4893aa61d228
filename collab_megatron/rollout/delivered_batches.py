"""Delivered batches: every batch is in the journal before it is sent, so that the same request gets the same batch."""

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
    """The batch of one shard for one step."""

    trees: list[tuple[int, int, bool]]  # step, slot, replaced by another tree
    answer: Answer
    lines: bytes  # of the record, compressed (zstd); empty where record.every skips the step
    schema: int = 0  # schema of the lines

    def unpacked(self) -> list[bytes]:
        """The record lines."""
        return zstandard.decompress(self.lines).splitlines(keepends=True) if self.lines else []


class _Form(msgspec.Struct):
    schema: int = 0


class DeliveredBatches:
    """The batches of shard `index` of `count`. The newest is in memory too: without replay the journal returns none."""

    def __init__(self, journal: Journal, index: int, count: int) -> None:
        self._journal = journal
        self._key = count * 4096 + index  # another number of shards makes other batches
        self._newest: tuple[int, DeliveredBatch] | None = None

    def get(self, step: int) -> DeliveredBatch | None:
        """The batch of `step` as delivered. Raises RunError if another version of this package delivered it."""
        if self._newest is not None and self._newest[0] == step:
            return self._newest[1]
        content = self._journal.delivered(self._key, step)
        if content is None:
            return None
        if msgspec.msgpack.decode(content, type=_Form).schema != SCHEMA:
            raise RunError(
                f"the journal has the batch of step {step + 1} in the format of another version of collab_megatron: "
                "continue with the version that started the run, or set journal.path to a new file (the batch is made "
                "again)"
            )
        return msgspec.msgpack.decode(content, type=DeliveredBatch)

    def put(self, step: int, trees: Sequence[Tree], answer: Answer, lines: Sequence[bytes]) -> None:
        """Write the batch of `step` to the journal. It is durable when this returns."""
        trees_of_batch = [(tree.id.step, tree.id.slot, tree.replaced) for tree in trees]
        packed = zstandard.ZstdCompressor(level=1).compress(b"".join(lines)) if lines else b""
        content = DeliveredBatch(trees_of_batch, answer, packed, SCHEMA)
        self._journal.record_delivery(self._key, step, msgspec.msgpack.encode(content))
        self._newest = step, content

    def remove(self, step: int) -> None:
        """Forget the batch of `step`: it will be made again."""
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
