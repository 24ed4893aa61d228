"""Which trees are a driver process's own, in which order it begins them, and on which prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from collab_megatron.data.row_order import refill_index, step_indices
from collab_megatron.rollout.group import TreeSeat
from collab_megatron.types import Task


@dataclass(frozen=True)
class Shard:
    """Pure functions of seed, step and shard number: any process, at any time, deals out the same."""

    tasks: Sequence[Task]
    seed: int
    prompts_per_step: int
    futures_per_tree: int  # n * max(K, 1)
    index: int = 0
    count: int = 1

    @property
    def quota(self) -> int:
        """Trees of every batch that this shard brings."""
        return len(range(self.index, self.prompts_per_step, self.count))

    def seats(self, first_step: int) -> Iterator[TreeSeat]:
        """Its trees from `first_step` on, in the order of the prompts."""
        step = first_step
        while True:
            for slot in range(self.index, self.prompts_per_step, self.count):
                yield self._seat(step, slot)
            step += 1

    def refill(self, step: int, number: int) -> TreeSeat:
        """The tree that takes the place of one that taught nothing; `number` counts this shard's of the step."""
        return self._seat(step, self.prompts_per_step + number * self.count + self.index)

    def task(self, seat: TreeSeat) -> Task:
        """The prompt of a tree."""
        rows, prompts = len(self.tasks), self.prompts_per_step
        if seat.slot < prompts:
            return self.tasks[step_indices(self.seed, seat.step, num_rows=rows, batch_size=prompts)[seat.slot]]
        return self.tasks[refill_index(self.seed, seat.step, seat.slot - prompts, num_rows=rows, batch_size=prompts)]

    def _seat(self, step: int, slot: int) -> TreeSeat:
        # refills stand behind all prompts: slots of a step are never more than twice as many as its prompts
        number = step * 2 * self.prompts_per_step + slot
        return TreeSeat(step, slot, first_sample=number * self.futures_per_tree)
