"""Tree scheduler: which trees run, when new trees start, and which finished trees make the batch of a step.

Staleness is a capacity. With max_staleness s at most s + 1 batches of trees run when the trainer asks for a batch.
Trees leave in the order in which they finish, with one exception: a tree sampled by weights of version v is in batch
v + s at the latest. A batch waits for the trees that are due in it, and for trees that are due later but will not fit
into the later batches. So no trained token is older than s updates, and no finished tree is discarded.
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
    """One shard's part of the driver section."""

    max_staleness: int
    oversample: int | None  # trees beyond max_staleness batches; None: one batch
    by_prompt: bool  # batch t has exactly the trees of step t
    refills: int  # replacements of trees without a learning signal, per step

    def capacity(self, quota: int) -> int:
        """The most trees that run when the trainer asks for a batch."""
        beyond = quota if self.oversample is None else min(self.oversample, quota)
        return quota * self.max_staleness + beyond

    @property
    def lookback(self) -> int:
        """After so many batches no tree of a step is left. It starts s steps ahead at the earliest and at its own step
        at the latest, has its replies one step later, and is due s steps after that."""
        return 2 * self.max_staleness + 2


@dataclass(eq=False)
class Tree:
    """One conversation tree, running or finished."""

    id: TreeId
    started_s: float = field(default_factory=time.monotonic)
    version: int | None = None  # oldest weights that sampled its replies; None before
    group: Group | None = None  # once it has finished
    finish_order: int = 0  # number of trees that finished before it
    replaced: bool = False  # a replacement has started: it is delivered, but does not count towards the quota
    running: asyncio.Task[None] | None = None

    def due(self, max_staleness: int) -> float:
        """The last batch that may contain it."""
        return math.inf if self.version is None else self.version + max_staleness


DeliveredTrees = Mapping[tuple[int, int], bool]
"""(step, slot) of a tree -> whether it was replaced."""
Grow = Callable[[Tree], Coroutine[Any, Any, Group]]
Reserve = Callable[[], Reservation | None]
"""A reservation in the budget for one more tree; None without room."""


class TreeScheduler:
    """The trees of one shard. `grow` sets the tree's version once its replies are sampled. For one event loop."""

    def __init__(
        self,
        plan: ShardPlan,
        rules: SchedulerRules,
        grow: Grow,
        reserve: Reserve,
        *,
        step: int,
        delivered: DeliveredTrees,
    ) -> None:
        """`step`: the first batch that the trainer will ask for. `delivered`: trees of earlier batches, back to
        `rules.lookback`, and of later batches in the journal. If it has no tree of an earlier step, all trees of that
        step count as delivered."""
        self._plan, self._rules, self._grow, self._reserve = plan, rules, grow, reserve
        self._step = step
        self._base = max(0, step - rules.lookback)
        self._delivered = delivered
        known = {of for of, _ in delivered}
        self._unknown = {past for past in range(self._base, step) if past not in known}
        self._tree_ids: Iterator[TreeId] = plan.tree_ids(self._base)
        self._started = 0  # trees started or skipped since _base
        self._num_finished = 0
        self._refilled = Counter(of for (of, _), replaced in delivered.items() if replaced)
        self._pending_refills = [
            plan.refill(of, number) for of, count in self._refilled.items() for number in range(count)
        ]
        self._next: TreeId | None = None  # the next tree to start
        self._trees: list[Tree] = []
        self._changed = asyncio.Event()
        self.failure: Exception | None = None  # raised by a tree: the driver stops
        self.admitting = True  # False: no more trees start

    @property
    def idle(self) -> bool:
        """Whether no tree runs."""
        return all(tree.group is not None for tree in self._trees)

    @property
    def num_running(self) -> int:
        """Number of running trees."""
        return sum(tree.group is None for tree in self._trees)

    def advance(self, step: int) -> None:
        """The trainer asks for batch `step`: start the trees that capacity and budget allow. May be called again to
        start trees for which the budget had no room."""
        self._step = max(self._step, step)
        allowed = self._plan.quota * (self._step - self._base) + self._rules.capacity(self._plan.quota)
        while self._next is not None or self._pending_refills or self._started < allowed:
            if self._next is None:
                self._next = self._pending_refills.pop(0) if self._pending_refills else self._next_tree_id()
            if not self._delivered_before(self._next) and not self._start(self._next):
                return
            self._next = None

    def take(self, step: int) -> list[Tree] | None:
        """The trees of batch `step`, in the order of their prompts; None while some are missing. Raises what a tree
        raised."""
        if self.failure is not None:
            raise self.failure
        chosen = self._by_prompt(step) if self._rules.by_prompt else self._by_completion(step)
        if chosen is None:
            return None
        taken = set(map(id, chosen))
        self._trees = [tree for tree in self._trees if id(tree) not in taken]
        return sorted(chosen, key=lambda tree: (tree.id.step, tree.id.slot))

    async def changed(self, timeout_s: float) -> None:
        """Waits at most `timeout_s`. Unblocked by a tree that finishes or fails."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout_s)
        self._changed.clear()

    async def close(self) -> None:
        """Cancel the running trees. Waits until they have ended."""
        await cancel_all(tree.running for tree in self._trees if tree.running is not None)
        self._trees = []

    def _by_completion(self, step: int) -> list[Tree] | None:
        quota, staleness = self._plan.quota, self._rules.max_staleness
        finished = sorted((tree for tree in self._trees if tree.group is not None), key=lambda tree: tree.finish_order)
        chosen: list[Tree] = []
        # of the trees due within j more batches, all that do not fit into those j must go now
        for j in range(staleness + 1):
            due = {t for t in self._trees if not t.replaced and t.due(staleness) <= step + j}
            missing = len(due) - j * quota - sum(tree in due for tree in chosen)
            more = [tree for tree in finished if tree in due and tree not in chosen]
            if missing > len(more):
                return None
            chosen += more[: max(0, missing)]
        more = [tree for tree in finished if not tree.replaced and tree not in chosen]
        chosen += more[: max(0, quota - len(chosen))]
        replaced = [tree for tree in finished if tree.replaced]
        return chosen + replaced if len(chosen) >= quota else None

    def _by_prompt(self, step: int) -> list[Tree] | None:
        chosen = [tree for tree in self._trees if tree.id.step == step]
        if any(tree.group is None for tree in chosen):
            return None
        return chosen if sum(not tree.replaced for tree in chosen) >= self._plan.quota else None

    def _next_tree_id(self) -> TreeId:
        self._started += 1
        return next(self._tree_ids)

    def _delivered_before(self, tree_id: TreeId) -> bool:
        return tree_id.step in self._unknown or (tree_id.step, tree_id.slot) in self._delivered

    def _start(self, tree_id: TreeId) -> bool:
        """Start a tree; False if the budget has no room for it, or no more trees may start."""
        reservation = self._reserve() if self.admitting else None
        if reservation is None:
            return False
        tree = Tree(tree_id)
        tree.running = asyncio.create_task(self._run(tree, reservation), name=f"tree {tree_id}")
        tree.running.add_done_callback(lambda _: reservation.release())  # a task that is cancelled early never runs
        self._trees.append(tree)
        return True

    async def _run(self, tree: Tree, reservation: Reservation) -> None:
        try:
            with reservation.spending():
                group = await self._grow(tree)
            reservation.release()
            tree.group, tree.finish_order = group, self._num_finished
            self._num_finished += 1
            self._refill(tree)
        except Exception as error:  # noqa: BLE001 - raised by `take`
            self.failure = self.failure or error
        self._changed.set()

    def _refill(self, tree: Tree) -> None:
        """Replace a tree without a learning signal, while the step has refills left."""
        step = tree.id.step
        number = self._refilled[step]
        assert tree.group is not None
        if has_spread(tree.group) or number >= self._rules.refills:
            return
        if self._start(self._plan.refill(step, number)):
            self._refilled[step] = number + 1
            tree.replaced = True
