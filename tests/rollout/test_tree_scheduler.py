"""Which trees begin when, and which make a batch: staleness, completion order, refills, carry-over, restarts."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import pytest

from collab_megatron.config.sections import BudgetSection
from collab_megatron.errors import RunError
from collab_megatron.rollout.llm.budget import Budget
from collab_megatron.rollout.shard_plan import ShardPlan
from collab_megatron.rollout.tree_scheduler import SchedulerRules, Tree, TreeScheduler
from collab_megatron.types import Group, Reply
from tests.rollout.fakes import TASK, policy_turn

SYNC = SchedulerRules(max_staleness=0, oversample=None, by_prompt=False, refills=0)


def shard(quota: int = 4, index: int = 0, count: int = 1) -> ShardPlan:
    return ShardPlan([TASK], seed=1, prompts_per_step=quota, futures_per_tree=2, index=index, count=count)


def group(*advantages: float, kept: bool = True) -> Group:
    return Group(TASK, (1,), tuple(Reply(policy_turn("x"), (), mr=0.0, advantage=a) for a in advantages), kept=kept)


@dataclass
class Garden:
    """Trees that end when they are told to; the live version is `version`."""

    version: int = 0
    growing: dict[tuple[int, int], tuple[Tree, asyncio.Future[Group]]] = field(default_factory=dict)
    begun: list[tuple[int, int]] = field(default_factory=list)

    async def grow(self, tree: Tree) -> Group:
        key = tree.id.step, tree.id.slot
        self.begun.append(key)
        tree.version = self.version
        self.growing[key] = tree, asyncio.get_running_loop().create_future()
        return await self.growing[key][1]

    async def end(self, *keys: tuple[int, int], grown: Callable[[], Group] = lambda: group(1.0, -1.0)) -> None:
        for key in keys:
            _, future = self.growing.pop(key)
            future.set_result(grown())
            await settle()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@asynccontextmanager
async def planted(
    rules: SchedulerRules, *, of: ShardPlan | None = None, step: int = 0, delivered=None, budget: Budget | None = None
):
    """`budget` takes two calls for a tree."""
    garden, budget = Garden(), budget or Budget(BudgetSection(), None, dict)
    scheduler = TreeScheduler(
        of or shard(), rules, garden.grow, lambda: budget.reserve(2), step=step, delivered=delivered or {}
    )
    yield scheduler, garden
    await scheduler.close()


def names(trees: list[Tree] | None) -> list[tuple[int, int]] | None:
    return None if trees is None else [(tree.id.step, tree.id.slot) for tree in trees]


async def test_on_policy_one_batch_is_under_way_and_leaves_as_a_whole() -> None:
    async with planted(SYNC) as (scheduler, garden):
        scheduler.advance(0)
        await settle()
        assert garden.begun == [(0, 0), (0, 1), (0, 2), (0, 3)]
        await garden.end((0, 3), (0, 0), (0, 2))
        assert scheduler.take(0) is None
        await garden.end((0, 1))
        assert names(scheduler.take(0)) == [(0, 0), (0, 1), (0, 2), (0, 3)]  # by prompt, in whichever order they ended
        assert len(garden.begun) == 4  # nothing begins before the trainer asks
        scheduler.advance(1)
        await settle()
        assert garden.begun[4:] == [(1, 0), (1, 1), (1, 2), (1, 3)]


async def test_with_staleness_groups_leave_as_they_end_and_the_oldest_are_waited_for() -> None:
    async with planted(SchedulerRules(1, None, by_prompt=False, refills=0)) as (scheduler, garden):
        scheduler.advance(0)
        await settle()
        assert len(garden.begun) == 8
        await garden.end((1, 0), (0, 1), (1, 2), (0, 3))
        assert names(scheduler.take(0)) == [(0, 1), (0, 3), (1, 0), (1, 2)]
        garden.version = 1
        scheduler.advance(1)
        await settle()
        assert len(garden.begun) == 12
        await garden.end((2, 0), (2, 1), (2, 2), (2, 3))
        # four have ended, but those that version 0 sampled would be too old in the batch after this one
        assert scheduler.take(1) is None
        await garden.end((0, 0), (0, 2), (1, 1), (1, 3))
        assert names(scheduler.take(1)) == [(0, 0), (0, 2), (1, 1), (1, 3)]


async def test_by_prompt_a_batch_is_that_of_its_step() -> None:
    async with planted(SchedulerRules(1, None, by_prompt=True, refills=0)) as (scheduler, garden):
        scheduler.advance(0)
        await settle()
        await garden.end((1, 0), (1, 1), (1, 2), (1, 3), (0, 0), (0, 1), (0, 2))
        assert scheduler.take(0) is None
        await garden.end((0, 3))
        assert names(scheduler.take(0)) == [(0, 0), (0, 1), (0, 2), (0, 3)]
        assert names(scheduler.take(1)) == [(1, 0), (1, 1), (1, 2), (1, 3)]


async def test_oversampled_trees_are_carried_over_and_never_thrown_away() -> None:
    async with planted(SchedulerRules(1, 2, by_prompt=False, refills=0)) as (scheduler, garden):
        scheduler.advance(0)
        await settle()
        assert len(garden.begun) == 4 + 2
        await garden.end((0, 1), (0, 2), (1, 0), (1, 1))
        assert names(scheduler.take(0)) == [(0, 1), (0, 2), (1, 0), (1, 1)]
        assert scheduler.num_running == 2  # the two slow ones go on
        garden.version = 1
        scheduler.advance(1)
        await settle()
        assert len(garden.begun) == 8 + 2
        await garden.end((0, 0), (0, 3), (1, 2), (1, 3))
        assert names(scheduler.take(1)) == [(0, 0), (0, 3), (1, 2), (1, 3)]


async def test_groups_that_teach_nothing_are_replaced_bounded_and_delivered_beside() -> None:
    async with planted(SchedulerRules(0, None, by_prompt=False, refills=2)) as (scheduler, garden):
        scheduler.advance(0)
        await settle()
        await garden.end((0, 0), grown=lambda: group(0.0, 0.0))
        await garden.end((0, 1), grown=lambda: group(kept=False))
        await garden.end((0, 2), grown=lambda: group(0.0, 0.0))  # a third is not replaced
        await garden.end((0, 3))
        assert garden.begun[4:] == [(0, 4), (0, 5)]
        assert scheduler.take(0) is None
        await garden.end((0, 4), (0, 5))
        taken = scheduler.take(0)
        assert names(taken) == [(0, slot) for slot in range(6)]
        assert taken is not None
        assert [tree.replaced for tree in taken] == [True, True, False, False, False, False]


async def test_what_a_tree_raises_reaches_who_asks_for_a_batch() -> None:
    async with planted(SYNC) as (scheduler, garden):
        scheduler.advance(0)
        await settle()
        garden.growing[0, 2][1].set_exception(RunError("the journal lacks a reply"))
        await settle()
        with pytest.raises(RunError, match="lacks a reply"):
            scheduler.take(0)


async def test_without_room_in_the_budget_the_trees_under_way_are_finished() -> None:
    answered = {("user", "m"): (0, 0.0)}
    budget = Budget(BudgetSection(hard_calls=16), None, lambda: answered)
    async with planted(SchedulerRules(1, None, by_prompt=False, refills=2), budget=budget) as (scheduler, garden):
        scheduler.advance(0)
        await settle()
        answered["user", "m"] = (16, 0.0)
        scheduler.advance(1)
        await garden.end((0, 0), grown=lambda: group(0.0, 0.0))
        assert len(garden.begun) == 8
        assert not scheduler.idle
        await garden.end(*list(garden.growing))
        assert scheduler.idle
        assert len(scheduler.take(0) or []) == 4


async def test_a_tree_begins_when_those_under_way_leave_room_for_it_in_their_order() -> None:
    answered = {("user", "m"): (0, 0.0)}
    budget = Budget(BudgetSection(hard_calls=5), None, lambda: answered)
    async with planted(SchedulerRules(0, None, by_prompt=False, refills=1), budget=budget) as (scheduler, garden):
        scheduler.advance(0)
        await settle()
        assert garden.begun == [(0, 0), (0, 1), (0, 2)]  # with 0, 2 and 4 calls set aside, under a cap of 5
        await garden.end((0, 1), grown=lambda: group(0.0, 0.0))
        assert garden.begun[3:] == [(0, 4)]  # it ended without a call: there is room for the one in its place
        scheduler.advance(0)
        await settle()
        assert len(garden.begun) == 4
        await garden.end((0, 4))
        scheduler.advance(0)
        await settle()
        assert garden.begun[4:] == [(0, 3)]
        await garden.end((0, 0), (0, 2), (0, 3))
        assert names(scheduler.take(0)) == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4)]


def test_a_shard_whose_part_of_the_oversampled_trees_is_none_begins_none() -> None:
    rules = [SchedulerRules(1, part, by_prompt=False, refills=0) for part in (None, 0, 1, 9)]
    assert [each.capacity(4) for each in rules] == [8, 4, 5, 8]


async def test_a_restart_begins_what_was_not_delivered_and_nothing_else() -> None:
    """Batch 0 took four trees of two steps, one of them with another in its place; the driver dies at step 1."""
    delivered = {(0, 1): False, (0, 3): False, (1, 0): False, (1, 2): False, (0, 2): True}
    async with planted(SchedulerRules(1, None, by_prompt=False, refills=1), step=1, delivered=delivered) as (
        scheduler,
        garden,
    ):
        scheduler.advance(1)
        await settle()
        assert sorted(garden.begun) == [(0, 0), (0, 4), (1, 1), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3)]


async def test_a_resume_without_a_journal_begins_with_the_step() -> None:
    async with planted(SchedulerRules(2, None, by_prompt=False, refills=0), step=5) as (scheduler, garden):
        scheduler.advance(5)
        await settle()
        assert min(garden.begun) == (5, 0)
        assert len(garden.begun) == 12


@pytest.mark.parametrize("seed", range(20))
async def test_no_token_is_older_than_the_bound_and_every_tree_leaves_once(seed: int) -> None:
    """Random trees of random length, any staleness, oversampling, refills: what is promised holds."""
    rng = random.Random(seed)
    quota, staleness, steps = rng.randint(1, 5), rng.randint(0, 3), 12
    oversample = rng.randint(0, quota) if staleness else None
    rules = SchedulerRules(staleness, oversample, by_prompt=False, refills=rng.randint(0, quota))
    taken: list[tuple[int, int]] = []
    async with planted(rules, of=shard(quota)) as (scheduler, garden):
        for step in range(steps):
            garden.version = step
            scheduler.advance(step)
            while (trees := scheduler.take(step)) is None:
                await settle()
                assert garden.growing, "nothing grows, and the batch is not complete"
                flat = rng.random() < 0.2
                chosen = rng.choice(list(garden.growing))
                await garden.end(chosen, grown=lambda flat=flat: group(0.0, 0.0) if flat else group(1.0, -1.0))
            counted = [tree for tree in trees if not tree.replaced]
            assert len(counted) == quota
            assert all(step - (tree.version or 0) <= staleness for tree in counted)
            assert scheduler.num_running <= rules.capacity(quota)
            taken += names(trees) or []
            for _ in range(rng.randint(0, 3)):  # some end while the trainer trains
                if garden.growing:
                    await garden.end(rng.choice(list(garden.growing)))
    assert len(set(taken)) == len(taken)
    base = [key for key in taken if key[1] < quota]
    first = {(step, slot) for step in range(steps - 2 * staleness - 2) for slot in range(quota)}
    assert first <= set(base)


def test_refills_of_all_shards_follow_the_epochs_order() -> None:
    tasks = [replace(TASK, task_id=str(number)) for number in range(16)]
    shards = [ShardPlan(tasks, 1, prompts_per_step=4, futures_per_tree=2, index=index, count=2) for index in range(2)]
    (alone,) = [ShardPlan(tasks, 1, prompts_per_step=4, futures_per_tree=2)]
    dealt = [one.task(one.refill(step, n)).task_id for step in range(4) for n in range(2) for one in shards]
    assert dealt == [alone.task(alone.refill(step, n)).task_id for step in range(4) for n in range(4)]
    assert sorted(dealt, key=int) == [task.task_id for task in tasks]  # each once in the epoch


def test_shards_deal_out_every_prompt_once_and_number_all_futures_apart() -> None:
    shards = [shard(5, index, 2) for index in range(2)]
    assert [one.quota for one in shards] == [3, 2]
    tree_ids = [tree_id for one in shards for tree_id, _ in zip(one.tree_ids(3), range(2 * one.quota), strict=False)]
    assert sorted((tree_id.step, tree_id.slot) for tree_id in tree_ids) == [
        (step, slot) for step in (3, 4) for slot in range(5)
    ]
    refills = [one.refill(step, number) for one in shards for step in (3, 4) for number in range(2)]
    samples = [tree_id.first_sample + k for tree_id in [*tree_ids, *refills] for k in range(2)]
    assert len(set(samples)) == len(samples)
