"""Equal replies of a group share futures; first user turns share a request."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from collab_megatron.config.sections.rollout import EqualReplies
from collab_megatron.errors import RunError
from collab_megatron.figures import values
from collab_megatron.rollout.equal_replies import first_equal, is_uniform
from collab_megatron.rollout.first_turns import FirstTurns
from collab_megatron.rollout.future import Players
from collab_megatron.rollout.group import GroupRules, TreeId, grow_group, has_spread, tally, training_samples
from collab_megatron.rollout.metrics import rollout_metrics
from collab_megatron.types import Generation, Group, Message, PolicyTurn, RolloutStatus, Task
from tests.rollout.fakes import LIMITS, TASK, LengthScorer, ScriptedEngine, ScriptedUser, players, policy_turn

TREE_ID = TreeId(3, 1, first_sample=100)
RULES = GroupRules(
    num_replies=3,
    num_futures=2,
    min_replies=2,
    min_futures=2,
    group_timeout_s=60,
    advantage_eps=0.05,
    min_group_std=0.01,
)


class SampleScorer(LengthScorer):
    """Scores a conversation by its sample index."""

    async def score(self, conversation: Any) -> dict[str, float]:
        self.seen.append(conversation)
        return {"accuracy": float(conversation.sample_index)}


def ends(chat: Sequence[Message], sample_index: int) -> str:
    return "[TERMINATE]"


async def grow(
    texts: Sequence[str], equal_replies: EqualReplies, *, cast: Players | None = None, **rules: Any
) -> tuple[Group, ScriptedUser, LengthScorer]:
    user, scorer = ScriptedUser(ends), SampleScorer()
    grown_by = replace(RULES, equal_replies=equal_replies, **rules)
    turns = [policy_turn(text) for text in texts]
    cast = cast or players(ScriptedEngine(["later"]), user, scorer)
    group = await grow_group(TASK, (1, 2), turns, TREE_ID, rules=grown_by, limits=LIMITS, players=cast)
    return group, user, scorer


def test_replies_are_equal_by_their_ids() -> None:
    failed = replace(policy_turn(""), generation=Generation((), (), (), "failed"))
    assert first_equal([policy_turn("a"), policy_turn("b"), policy_turn("a"), failed, failed]) == [0, 1, 0, 3, 4]
    assert first_equal([policy_turn("(x)a"), policy_turn("(y)a")]) == [0, 1]  # the policy sees its own thoughts
    assert is_uniform([policy_turn("a"), policy_turn("a")])
    assert not is_uniform([policy_turn("a"), policy_turn("b")])
    assert not is_uniform([failed, failed])
    assert not is_uniform([policy_turn("a")])


async def test_once_plays_the_futures_of_each_distinct_reply() -> None:
    group, user, scorer = await grow(["a", "b", "a"], "once")
    assert sorted(user.asked) == [100, 101, 102, 103]  # the third reply plays none
    assert len(scorer.seen) == 4
    assert [reply.mr for reply in group.replies_G] == [100.5, 102.5, 100.5]
    assert [reply.same_as for reply in group.replies_G] == [None, None, 0]
    first, _, copy = group.replies_G
    assert [f.copied for f in first.futures_K] == [False, False]
    assert [(f.index, f.copied, f.calls) for f in copy.futures_K] == [(0, True, ()), (1, True, ())]
    assert [f.reward for f in copy.futures_K] == [f.reward for f in first.futures_K]
    assert copy.advantage == first.advantage
    assert sum(reply.advantage or 0.0 for reply in group.replies_G) == pytest.approx(0.0)
    assert len(training_samples(group, "keep")) == 3
    figures = values(rollout_metrics([group], {"accuracy": 1.0}))
    assert figures["rollout/distinct_share"] == pytest.approx(2 / 3)
    assert figures["rollout/futures_played"] == 4
    assert figures["rollout/groups_uniform"] == 0


async def test_pool_plays_all_and_averages_over_the_equal_ones() -> None:
    group, user, _ = await grow(["a", "b", "a"], "pool")
    assert sorted(user.asked) == list(range(100, 106))
    pooled = (100 + 101 + 104 + 105) / 4
    assert [reply.mr for reply in group.replies_G] == [pooled, 102.5, pooled]
    assert not any(f.copied for reply in group.replies_G for f in reply.futures_K)


async def test_apart_keeps_the_noise() -> None:
    group, user, _ = await grow(["a", "b", "a"], "apart")
    assert len(user.asked) == 6
    assert [reply.mr for reply in group.replies_G] == [100.5, 102.5, 104.5]
    assert [reply.same_as for reply in group.replies_G] == [None] * 3


@pytest.mark.parametrize("equal_replies", ["once", "pool"])
async def test_a_group_of_one_distinct_reply_plays_one_future_for_the_curves(equal_replies: EqualReplies) -> None:
    group, user, scorer = await grow(["a", "a", "a"], equal_replies)
    assert (user.asked, len(scorer.seen)) == ([100], 1)
    assert [reply.mr for reply in group.replies_G] == [100.0] * 3  # min_futures is 2, of two that are not played
    assert [reply.advantage for reply in group.replies_G] == [0.0] * 3
    assert group.kept
    assert not has_spread(group)  # so it is refilled
    assert values(rollout_metrics([group], {"accuracy": 1.0}))["rollout/groups_uniform"] == 1


async def test_or_none_and_it_is_neither_dropped_nor_lost() -> None:
    group, user, scorer = await grow(["a", "a", "a"], "once", uniform_group_futures=0)
    assert (user.asked, scorer.seen) == ([], [])
    assert [(reply.mr, reply.advantage) for reply in group.replies_G] == [(None, 0.0)] * 3
    assert not has_spread(group)
    assert tally([group]).lost == 0
    assert [sample.advantage for sample in training_samples(group, "keep")] == [0.0] * 3
    assert {(sample.reward, sample.group) for sample in training_samples(group, "keep")} == {(0.0, "3/1")}
    assert training_samples(group, "drop") == []
    figures = values(rollout_metrics([group], {"accuracy": 1.0}))
    assert "reward/mr_mean" not in figures  # no measurement, no zero


async def test_a_uniform_group_that_is_compared_with_other_groups_plays_all_futures() -> None:
    group, user, _ = await grow(["a", "a", "a"], "once", uniform_group_futures=0, baseline="batch", scale="batch_std")
    assert user.asked == [100, 101]
    assert [sample.reward for sample in training_samples(group, "keep")] == [100.5] * 3


async def test_equal_replies_stay_equal_with_overlong_shaping() -> None:
    """Replies of 2, 4 and 2 tokens, of at most 4, the last 2 of which cost up to 1."""
    shaping: dict[str, Any] = {"overlong_share": 0.5, "longest": 4, "scale": "none"}
    group, _, _ = await grow(["a", "bbb", "a"], "once", **shaping)
    assert [reply.mr for reply in group.replies_G] == [100.5, 102.5, 100.5]
    assert [reply.shaped_reward for reply in group.replies_G] == [100.5, 101.5, 100.5]
    assert [reply.advantage for reply in group.replies_G] == pytest.approx([-1 / 3, 2 / 3, -1 / 3])


async def test_a_uniform_group_whose_future_fails_is_dropped() -> None:
    def fails(chat: Sequence[Message], sample_index: int) -> str:
        raise RunError("the provider is down")

    cast = players(ScriptedEngine(["later"]), ScriptedUser(fails))
    group, _, _ = await grow(["a", "a", "a"], "once", cast=cast)
    assert not group.kept
    assert "the provider is down" in tally([group]).why


async def test_a_broken_reply_is_judged_once_for_all_its_copies() -> None:
    scorer = SampleScorer()
    cut = policy_turn("aa", ended=False)
    turns: list[PolicyTurn] = [cut, policy_turn("b"), cut]
    cast = players(ScriptedEngine(["later"]), ScriptedUser(ends), scorer)
    rules = replace(RULES, equal_replies="once")
    group = await grow_group(TASK, (1,), turns, TREE_ID, rules=rules, limits=LIMITS, players=cast)
    assert len(scorer.seen) == 1 + 2
    assert [[f.copied for f in reply.futures_K] for reply in group.replies_G] == [
        [False, True],
        [False, False],
        [True, True],
    ]


@dataclass
class TogetherUser(ScriptedUser):
    """Writes several turns in one request; even and odd sample indices are two simulators of a mixture."""

    requests: list[tuple[int, ...]] = field(default_factory=list)
    alone: int | None = None  # a part that takes one turn a request
    failing: bool = False

    def request_of(self, sample_index: int) -> int | None:
        part = sample_index % 2
        return None if part == self.alone else part

    async def replies(self, task: Task, chat: Sequence[Message], *, sample_indices: Sequence[int]) -> list[str]:
        self.requests.append(tuple(sample_indices))
        await asyncio.sleep(0)
        if self.failing:
            raise RunError("the provider is down")
        return [f"turn of {index}" for index in sample_indices]


def cast_of(user: TogetherUser) -> Players:
    return replace(players(ScriptedEngine(["ok"]), user), together=user)


async def test_the_first_user_turns_of_a_reply_come_from_one_request_of_each_simulator() -> None:
    user = TogetherUser(ends)
    group, _, _ = await grow(["a", "b", "a"], "once", cast=cast_of(user), num_futures=4)
    assert sorted(user.requests) == [(100, 102), (101, 103), (104, 106), (105, 107)]
    assert sorted(user.asked) == list(range(100, 108))  # later turns: one request each
    said = [f.messages[0].content for f in group.replies_G[0].futures_K]
    assert said == [f"turn of {100 + k}" for k in range(4)]


async def test_a_simulator_without_n_is_asked_turn_by_turn() -> None:
    user = TogetherUser(ends, alone=1)
    await grow(["a", "b", "c"], "once", cast=cast_of(user), num_futures=3)
    assert sorted(user.requests) == [(100, 102), (106, 108)]  # of the reply between them only 104 is even
    assert sorted(user.asked) == list(range(100, 109))  # the first turn of the others, the second of those four


async def test_a_failed_request_loses_its_futures_and_no_others() -> None:
    user = TogetherUser(ends, alone=1, failing=True)
    group, _, _ = await grow(["a", "b"], "once", cast=cast_of(user), num_futures=4, min_futures=1)
    statuses = [[f.status for f in reply.futures_K] for reply in group.replies_G]
    lost, well = RolloutStatus.SIMULATOR_FAILED, RolloutStatus.TERMINATED
    assert statuses == [[lost, well, lost, well]] * 2


async def test_one_futures_deadline_does_not_end_the_request_of_the_others() -> None:
    user = TogetherUser(ends)
    turns = FirstTurns(user, user, (100, 102))
    asking = asyncio.create_task(turns.reply(TASK, (), sample_index=100))
    other = asyncio.create_task(turns.reply(TASK, (), sample_index=102))
    await asyncio.sleep(0)
    asking.cancel()
    assert await other == "turn of 102"
    assert user.requests == [(100, 102)]
    await turns.close()
