"""Shard plan: the trees of one driver process, their order, and their prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from collab_megatron.data.row_order import refill_index, step_indices
from collab_megatron.rollout.group import TreeId
from collab_megatron.types import Task


@dataclass(frozen=True)
class ShardPlan:
    """Pure functions of seed, step and shard index: every process computes the same plan at any time."""

    tasks: Sequence[Task]
    seed: int
    prompts_per_step: int
    futures_per_tree: int  # sample indices of a tree: n times the most futures of a reply
    index: int = 0
    count: int = 1

    @property
    def quota(self) -> int:
        """The shard's number of trees in every batch."""
        return len(range(self.index, self.prompts_per_step, self.count))

    def tree_ids(self, first_step: int) -> Iterator[TreeId]:
        """The shard's trees from `first_step` on, in order of step and prompt."""
        step = first_step
        while True:
            for slot in range(self.index, self.prompts_per_step, self.count):
                yield self._tree_id(step, slot)
            step += 1

    def refill(self, step: int, number: int) -> TreeId:
        """Replacement number `number` of this shard in `step`."""
        return self._tree_id(step, self.prompts_per_step + number * self.count + self.index)

    def task(self, tree_id: TreeId) -> Task:
        """The prompt of a tree."""
        rows, prompts = len(self.tasks), self.prompts_per_step
        if tree_id.slot < prompts:
            return self.tasks[step_indices(self.seed, tree_id.step, num_rows=rows, batch_size=prompts)[tree_id.slot]]
        return self.tasks[
            refill_index(self.seed, tree_id.step, tree_id.slot - prompts, num_rows=rows, batch_size=prompts)
        ]

    def _tree_id(self, step: int, slot: int) -> TreeId:
        # slots of refills follow those of the prompts: a step has at most twice as many slots as prompts
        number = step * 2 * self.prompts_per_step + slot
        return TreeId(step, slot, first_sample=number * self.futures_per_tree)
