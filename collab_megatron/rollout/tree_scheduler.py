"""Which trees are under way, when new ones may begin, and which of them make the batch of a step.

Staleness is a capacity. With max_staleness s at most s + 1 batches of trees are under way when the trainer asks for
one. Groups leave in the order in which they end, with one exception: what weights of version v have sampled is in batch
v + s at the latest. A batch waits for the trees whose last chance it is, and for as many of the next batches' as would
not fit into those. So no trained token is older than s updates, and nothing that was paid for is thrown away.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from collab_megatron.concurrency import cancel_all
from collab_megatron.rollout.group import TreeId, has_spread
from collab_megatron.rollout.llm.budget import Reservation
from collab_megatron.rollout.shard_plan import ShardPlan
from collab_megatron.types import Group


@dataclass(frozen=True)
class SchedulerRules:
    """A shard's share of the driver section."""

    max_staleness: int
    oversample: int | None  # trees beyond max_staleness batches; None: a batch
    by_prompt: bool  # batch t has the trees of step t, no others
    refills: int  # per step

    def capacity(self, quota: int) -> int:
        """Trees that may be under way when a batch is asked for."""
        beyond = quota if self.oversample is None else min(self.oversample, quota)
        return quota * self.max_staleness + beyond

    @property
    def lookback(self) -> int:
        """Batches after whose delivery no tree of a step is left: it is begun s steps ahead at the earliest, at its own
        step at the latest, has its replies a step later, and s steps after that it must go."""
        return 2 * self.max_staleness + 2


@dataclass(eq=False)
class Tree:
    """One conversation tree under way."""

    id: TreeId
    born: float = field(default_factory=time.monotonic)
    version: int | None = None  # oldest weights that sampled its replies, once they are there
    group: Group | None = None  # once it has ended
    ended: int = 0  # how many had ended before it
    replaced: bool = False  # another one was begun in its place: it is delivered, but fills no place in a batch
    running: asyncio.Task[None] | None = None

    def due(self, max_staleness: int) -> float:
        """The last batch that may have it."""
        return math.inf if self.version is None else self.version + max_staleness


DeliveredTrees = Mapping[tuple[int, int], bool]
"""(step, slot) of a tree -> whether another one was begun in its place."""
Grow = Callable[[Tree], Coroutine[Any, Any, Group]]
Reserve = Callable[[], Reservation | None]
"""Room in the budget for one more tree; None where there is none."""


class TreeScheduler:
    """The trees of one shard. `grow` sets the tree's version as soon as its replies are there. For one asyncio loop."""

    def __init__(
        self,
        shard: ShardPlan,
        rules: SchedulerRules,
        grow: Grow,
        reserve: Reserve,
        *,
        step: int,
        delivered: DeliveredTrees,
    ) -> None:
        """`step`: the first batch that will be asked for. `delivered`: trees of earlier batches, as far back as
        `rules.lookback`, and of later ones that the journal holds; where it names none of a step before `step`, all of
        that step are taken for delivered."""
        self._plan, self._rules, self._grow, self._reserve = shard, rules, grow, reserve
        self._step = step
        self._base = max(0, step - rules.lookback)
        self._delivered = delivered
        known = {of for of, _ in delivered}
        self._unknown = {past for past in range(self._base, step) if past not in known}
        self._tree_ids: Iterator[TreeId] = shard.tree_ids(self._base)
        self._begun = 0  # seats passed, from the base on
        self._ended = 0
        self._refilled = Counter(of for (of, _), replaced in delivered.items() if replaced)
        self._owed = [shard.refill(of, number) for of, count in self._refilled.items() for number in range(count)]
        self._next: TreeId | None = None  # whose turn it is to begin
        self._trees: list[Tree] = []
        self._news = asyncio.Event()
        self.failure: Exception | None = None  # what a tree raised: the work is over
        self.admitting = True  # False: no more trees begin, whatever the budget has room for

    @property
    def idle(self) -> bool:
        """Whether nothing grows."""
        return all(tree.group is not None for tree in self._trees)

    @property
    def under_way(self) -> int:
        """Trees that grow."""
        return sum(tree.group is None for tree in self._trees)

    def advance(self, step: int) -> None:
        """The trainer asks for batch `step`: as many trees begin as that and the budget allow. Called again, those for
        which there was no room before."""
        self._step = max(self._step, step)
        allowed = self._plan.quota * (self._step - self._base) + self._rules.capacity(self._plan.quota)
        while self._next is not None or self._owed or self._begun < allowed:
            if self._next is None:
                self._next = self._owed.pop(0) if self._owed else self._pass_tree_id()
            if not self._delivered_before(self._next) and not self._begin(self._next):
                return
            self._next = None

    def take(self, step: int) -> list[Tree] | None:
        """The trees of batch `step`, in the order of their prompts; None as long as some are missing."""
        if self.failure is not None:
            raise self.failure
        chosen = self._of_step(step) if self._rules.by_prompt else self._first_ended(step)
        if chosen is None:
            return None
        taken = set(map(id, chosen))
        self._trees = [tree for tree in self._trees if id(tree) not in taken]
        return sorted(chosen, key=lambda tree: (tree.id.step, tree.id.slot))

    async def changed(self, timeout_s: float) -> None:
        """Until a tree has ended or failed, at most `timeout_s`."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), timeout_s)
        self._news.clear()

    async def close(self) -> None:
        """End everything that grows."""
        await cancel_all(tree.running for tree in self._trees if tree.running is not None)
        self._trees = []

    def _first_ended(self, step: int) -> list[Tree] | None:
        quota, staleness = self._plan.quota, self._rules.max_staleness
        ended = sorted((tree for tree in self._trees if tree.group is not None), key=lambda tree: tree.ended)
        chosen: list[Tree] = []
        # of the trees that may wait for j more batches, all but what fits into those must go now
        for j in range(staleness + 1):
            due = {t for t in self._trees if not t.replaced and t.due(staleness) <= step + j}
            missing = len(due) - j * quota - sum(tree in due for tree in chosen)
            more = [tree for tree in ended if tree in due and tree not in chosen]
            if missing > len(more):
                return None
            chosen += more[: max(0, missing)]
        more = [tree for tree in ended if not tree.replaced and tree not in chosen]
        chosen += more[: max(0, quota - len(chosen))]
        replaced = [tree for tree in ended if tree.replaced]
        return chosen + replaced if len(chosen) >= quota else None

    def _of_step(self, step: int) -> list[Tree] | None:
        chosen = [tree for tree in self._trees if tree.id.step == step]
        if any(tree.group is None for tree in chosen):
            return None
        return chosen if sum(not tree.replaced for tree in chosen) >= self._plan.quota else None

    def _pass_tree_id(self) -> TreeId:
        self._begun += 1
        return next(self._tree_ids)

    def _delivered_before(self, tree_id: TreeId) -> bool:
        return tree_id.step in self._unknown or (tree_id.step, tree_id.slot) in self._delivered

    def _begin(self, tree_id: TreeId) -> bool:
        """Begin a tree; False where the budget has no room for it, or none may begin."""
        reservation = self._reserve() if self.admitting else None
        if reservation is None:
            return False
        tree = Tree(tree_id)
        tree.running = asyncio.create_task(self._run(tree, reservation), name=f"tree {tree_id}")
        tree.running.add_done_callback(lambda _: reservation.release())  # one that is cancelled may never have run
        self._trees.append(tree)
        return True

    async def _run(self, tree: Tree, reservation: Reservation) -> None:
        try:
            with reservation.spending():
                group = await self._grow(tree)
            reservation.release()
            tree.group, tree.ended = group, self._ended
            self._ended += 1
            self._refill(tree)
        except Exception as error:  # noqa: BLE001 - handed to whoever asks for a batch
            self.failure = self.failure or error
        self._news.set()

    def _refill(self, tree: Tree) -> None:
        """Begin another tree in place of one that teaches nothing, as long as the step has some left."""
        step = tree.id.step
        number = self._refilled[step]
        assert tree.group is not None
        if has_spread(tree.group) or number >= self._rules.refills:
            return
        if self._begin(self._plan.refill(step, number)):
            self._refilled[step] = number + 1
            tree.replaced = True
