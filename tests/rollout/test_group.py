"""Groups: concurrency, MR over the futures that are there, advantages, what is dropped."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from collab_megatron.errors import NoEngineLeft, RunError
from collab_megatron.figures import values
from collab_megatron.rollout.future import Players
from collab_megatron.rollout.group import (
    GroupRules,
    TreeId,
    grow_group,
    play_once,
    sample_replies,
    tally,
    training_samples,
    with_advantages,
)
from collab_megatron.rollout.metrics import evaluation_metrics, rollout_metrics, staleness_metrics
from collab_megatron.types import Future, Generation, Group, Message, Reply, RolloutStatus
from collab_megatron.wire.protocol import Tally
from tests.rollout.fakes import (
    LIMITS,
    TASK,
    LengthScorer,
    ScriptedEngine,
    ScriptedUser,
    generation,
    players,
    policy_turn,
)

TREE_ID = TreeId(3, 1, first_sample=100)
RULES = GroupRules(
    num_replies=4,
    num_futures=2,
    min_replies=2,
    min_futures=1,
    group_timeout_s=60,
    advantage_eps=0.05,
    min_group_std=0.01,
)


def terminate(chat: Sequence[Message], sample_index: int) -> str:
    return "[TERMINATE]"


async def grow(cast: Players, *, replies: int = 4, futures: int = 2, **rules: Any) -> Group:
    prompt_ids, turns = await sample_replies(TASK, TREE_ID, replies, LIMITS, cast)
    grown_by = replace(RULES, num_futures=futures, **rules)
    return await grow_group(TASK, prompt_ids, turns, TREE_ID, rules=grown_by, limits=LIMITS, players=cast)


def reply(*rewards: float | None) -> Reply:
    futures = tuple(
        Future(
            index=k,
            status=RolloutStatus.JUDGE_FAILED if reward is None else RolloutStatus.TERMINATED,
            messages=(),
            scores={} if reward is None else {"accuracy": reward},
            reward=reward,
        )
        for k, reward in enumerate(rewards)
    )
    scored = [reward for reward in rewards if reward is not None]
    return Reply(policy_turn("which day?"), futures, mr=sum(scored) / len(scored) if scored else None)


def group(*replies: Reply) -> Group:
    return with_advantages(Group(TASK, (1, 2), replies, kept=True), RULES)


async def test_every_future_has_its_own_sample_index() -> None:
    user = ScriptedUser(terminate)
    await grow(players(ScriptedEngine(["a", "b"]), user), replies=4, futures=3)
    assert sorted(user.asked) == list(range(100, 112))


async def test_futures_run_at_the_same_time() -> None:
    together = asyncio.Barrier(8)

    class WaitingUser(ScriptedUser):
        async def reply(self, task: object, chat: Sequence[Message], *, sample_index: int) -> str:
            await asyncio.wait_for(together.wait(), timeout=5)  # passes only if all eight are under way
            return "[TERMINATE]"

    grown = await grow(players(ScriptedEngine(["a"]), WaitingUser(terminate)))
    assert all(f.status is RolloutStatus.TERMINATED for r in grown.replies_G for f in r.futures_K)


async def test_a_lost_judge_drops_futures_not_the_group() -> None:
    calls = iter(range(100))
    scorer = LengthScorer(fail_if=lambda conversation: next(calls) == 0)
    grown = await grow(players(ScriptedEngine(["a", "b"]), ScriptedUser(terminate), scorer))
    assert grown.kept
    assert sum(f.status is RolloutStatus.JUDGE_FAILED for r in grown.replies_G for f in r.futures_K) == 1
    assert all(r.mr == 3.0 for r in grown.replies_G)  # the mean of what is there, nothing pulled towards zero


def test_missing_is_not_zero() -> None:
    grown = group(reply(1.0, 1.0), reply(0.0, None), reply(None, None))
    assert [r.mr for r in grown.replies_G] == [1.0, 0.0, None]
    assert grown.replies_G[2].advantage is None
    assert len(training_samples(grown, "keep")) == 2
    assert sum(r.advantage or 0.0 for r in grown.replies_G) == pytest.approx(0.0)


def test_a_group_with_one_reply_left_is_dropped_and_counted() -> None:
    grown = group(reply(1.0), reply(None), reply(None))
    assert not grown.kept
    assert training_samples(grown, "keep") == []
    assert values(rollout_metrics([grown], {"accuracy": 1.0}))["rollout/groups_dropped"] == 1


def test_a_group_without_spread_is_trained_or_left_out() -> None:
    flat, steep = group(reply(1.0), reply(1.0)), group(reply(1.0), reply(0.0), reply(0.5))
    assert [sample.advantage for sample in training_samples(flat, "keep")] == [0.0, 0.0]
    assert training_samples(flat, "drop") == []
    assert len(training_samples(steep, "drop")) == len(training_samples(steep, "keep")) == 3  # the middle one as well


def test_dropped_groups_are_counted_with_a_reason() -> None:
    kept, unplayed = group(reply(1.0), reply(0.0)), Group(TASK, (), (), kept=False, error="the engine refused")
    assert tally([kept, unplayed, kept]) == Tally(3, 1, "the engine refused")
    assert tally([kept]) == Tally(1, 0)
    assert tally([group(reply(None))]) == Tally(1, 1, "no future was scored")


async def test_unsampled_replies_stop_the_step() -> None:
    with pytest.raises(RunError, match="engine is gone"):
        await grow(players(ScriptedEngine(["a"], fail_after=0), ScriptedUser(terminate)))


async def test_a_group_asks_for_all_its_turns_under_the_prompts_name() -> None:
    engine = ScriptedEngine(["a"])
    await grow(players(engine, ScriptedUser(lambda chat, i: "go on")))
    assert len(engine.contexts) > 1
    assert engine.affinities == {TASK.task_id}


async def test_without_engines_the_whole_group_ends_at_once() -> None:
    waiting = []

    class SlowUser(ScriptedUser):
        async def reply(self, task: object, chat: Sequence[Message], *, sample_index: int) -> str:
            if sample_index > 100:
                waiting.append(sample_index)
                try:
                    await asyncio.sleep(60)
                finally:
                    waiting.remove(sample_index)
            return "go on"

    engine = ScriptedEngine(["a"], fail_after=1, failure=NoEngineLeft("no engine is left"))
    with pytest.raises(NoEngineLeft):
        await asyncio.wait_for(grow(players(engine, SlowUser(terminate))), timeout=10)
    assert waiting == []  # nobody goes on talking for a step that is given up


async def test_at_its_deadline_a_group_is_taken_with_the_futures_that_are_there() -> None:
    ended = []

    class SlowUser(ScriptedUser):
        async def reply(self, task: object, chat: Sequence[Message], *, sample_index: int) -> str:
            if sample_index in (100, 102, 103):
                try:
                    await asyncio.sleep(60)
                finally:
                    ended.append(sample_index)
            return "[TERMINATE]"

    cast = players(ScriptedEngine(["a", "b"]), SlowUser(terminate))
    grown = await asyncio.wait_for(grow(cast, group_timeout_s=0.1), timeout=5)
    assert sorted(ended) == [100, 102, 103]  # none goes on
    statuses = [[future.status for future in r.futures_K] for r in grown.replies_G]
    assert statuses[0] == [RolloutStatus.LATE, RolloutStatus.TERMINATED]
    assert statuses[1] == [RolloutStatus.LATE, RolloutStatus.LATE]
    assert grown.replies_G[0].mr == 3.0  # over the one that is there
    assert grown.replies_G[1].mr is None
    assert grown.kept
    metrics = values(rollout_metrics([grown], {"accuracy": 1.0}))
    assert metrics["rollout/futures_late"] == 3
    demanding = await asyncio.wait_for(grow(cast, group_timeout_s=0.1, min_futures=2), timeout=5)
    assert [r.mr is None for r in demanding.replies_G] == [True, True, False, False]


def test_staleness_is_of_the_trained_tokens() -> None:
    grown = group(reply(1.0), reply(0.0))
    assert values(staleness_metrics([grown], step=2)) == {"rollout/staleness_mean": 2.0, "rollout/staleness_max": 2.0}
    assert values(staleness_metrics([group(reply(1.0))], step=2)) == {}  # dropped


def test_metrics_of_a_step() -> None:
    grown = group(reply(1.0, 0.0), reply(0.0, 0.0), reply(None, 1.0))
    metrics = values(rollout_metrics([grown], {"accuracy": 1.0}))
    assert metrics["reward/mr_mean"] == pytest.approx((0.5 + 0.0 + 1.0) / 3)
    assert metrics["reward/accuracy_mean"] == pytest.approx(2 / 5)
    assert metrics["rollout/clarify_rate_ambiguous"] == 1.0
    assert "rollout/clarify_rate_complete" not in metrics  # nothing was measured: no figure
    assert metrics["rollout/futures_judge_failed"] == 1
    assert metrics["advantage/groups_with_signal"] == 1.0


async def test_evaluation_counts_failed_conversations_without_averaging_them() -> None:
    good = await play_once(
        TASK, TREE_ID, limits=LIMITS, players=players(ScriptedEngine(["a?"]), ScriptedUser(terminate))
    )
    lost = reply(None)
    figures = values(evaluation_metrics([(TASK, good), (TASK, lost)], {"accuracy": 1.0}))
    assert figures["accuracy"] == 3.0
    assert figures["conversations"] == 2
    assert figures["conversations_failed"] == 1


async def test_a_reply_without_tokens_leaves_its_group_and_ends_nothing() -> None:
    class Partly(ScriptedEngine):
        async def generate(self, input_ids: Sequence[int], **asked: Any) -> list[Generation]:
            return [Generation((), (), (), "stop"), *(await super().generate(input_ids, **asked))[1:]]

    cast = players(Partly(["a", "b"]), ScriptedUser(terminate))
    grown = await grow(cast)
    assert [r.mr is None for r in grown.replies_G] == [True, False, False, False]
    assert {f.status for f in grown.replies_G[0].futures_K} == {RolloutStatus.ENGINE_FAILED}
    assert len(training_samples(grown, "keep")) == 3
    once = await play_once(TASK, TREE_ID, limits=LIMITS, players=cast)  # a held-out conversation, too
    assert once.mr is None
    assert values(rollout_metrics([grown], {"accuracy": 1.0}))["rollout/futures_engine_failed"] == 2


async def test_questions_are_counted_in_the_reply_alone() -> None:
    cast = players(ScriptedEngine(["(which day?)done", "(which?)when?"]), ScriptedUser(terminate))
    grown = await grow(cast)
    assert [(r.thought, r.text) for r in grown.replies_G[:2]] == [("which day?", "done"), ("which?", "when?")]
    assert values(rollout_metrics([grown], {"accuracy": 1.0}))["rollout/clarify_rate"] == 0.5
    assert training_samples(grown, "keep")[0].reply_ids_T == generation("(which day?)done").token_ids_T


async def test_a_broken_reply_is_judged_once_for_all_its_futures() -> None:
    class Cutting(ScriptedEngine):
        async def generate(self, input_ids: Sequence[int], **asked: Any) -> list[Generation]:
            sampled = await super().generate(input_ids, **asked)
            return [generation("aaaa", ended=False), *sampled[1:]]

    user, scorer = ScriptedUser(terminate), LengthScorer()
    cast = players(Cutting(["a", "b"]), user, scorer)
    grown = await grow(cast, replies=2, futures=3, min_futures=3)
    cut, whole = grown.replies_G
    assert [f.index for f in cut.futures_K] == [0, 1, 2]
    assert {f.status for f in cut.futures_K} == {RolloutStatus.TRUNCATED}
    assert (cut.mr, whole.mr) == (2.0, 3.0)
    assert len(scorer.seen) == 1 + 3
    assert user.asked == [103, 104, 105]  # the others' sample indices do not move
    metrics = values(rollout_metrics([grown], {"accuracy": 1.0}))
    assert (metrics["rollout/cut_share"], metrics["rollout/empty_share"]) == (0.5, 0.0)
    assert "rollout/later_turns_broken_share" not in metrics

    prompt_ids, turns = await sample_replies(TASK, TREE_ID, 2, LIMITS, cast)
    limits = replace(LIMITS, cut_reply="penalty")
    punished = await grow_group(TASK, prompt_ids, turns, TREE_ID, rules=RULES, limits=limits, players=cast)
    assert punished.replies_G[0].mr == -1.0
    assert punished.replies_G[0].advantage == pytest.approx(-(punished.replies_G[1].advantage or 0.0))
    metrics = values(rollout_metrics([punished], {"accuracy": 1.0}))
    assert metrics["reward/accuracy_mean"] == 3.0  # of what was judged


def test_a_long_reply_loses_reward_but_keeps_its_mr() -> None:
    """Replies of 8 and 10 of 10 tokens; the last 4 cost: 0.5 and 1."""
    lengths, rules = (8, 10), replace(RULES, overlong_share=0.4, longest=10, scale="none")
    replies = tuple(replace(reply(1.0), turn=policy_turn("o" * (length - 1))) for length in lengths)
    assert tuple(each.turn.num_tokens for each in replies) == lengths
    group = with_advantages(Group(TASK, (1, 2), replies, kept=True, name="5/0"), rules)
    assert [each.mr for each in group.replies_G] == [1.0, 1.0]
    assert [each.advantage for each in group.replies_G] == pytest.approx([0.25, -0.25])
    samples = training_samples(group, "keep")
    assert [sample.reward for sample in samples] == [0.5, 0.0]
    assert {sample.group for sample in samples} == {"5/0"}


def test_rewards_go_to_the_trainer_where_the_baseline_is_the_batchs() -> None:
    group = with_advantages(
        Group(TASK, (1, 2), (reply(0.5), reply(0.5), reply(None)), kept=True),
        replace(RULES, baseline="batch", scale="batch_std"),
    )
    assert [each.advantage for each in group.replies_G] == [0.5, 0.5, None]


def test_broken_turns_are_counted() -> None:
    silent, cut = policy_turn("(hm)"), policy_turn("wh", ended=False)
    future = Future(0, RolloutStatus.TRUNCATED, (), {"accuracy": 1.0}, 1.0, turns=(policy_turn("ok"), cut))
    metrics = values(rollout_metrics([group(Reply(silent, (future,), 1.0), reply(0.0))], {"accuracy": 1.0}))
    assert metrics["rollout/empty_share"] == 0.5
    assert metrics["rollout/cut_share"] == 0.0
    assert metrics["rollout/later_turns_broken_share"] == 0.5
