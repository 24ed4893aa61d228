"""Noise of MR: the share that explains the spread between replies, and futures where one more can decide."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from collab_megatron.config.sections import RolloutSection
from collab_megatron.figures import values
from collab_megatron.limiter import AdaptiveLimiter
from collab_megatron.rollout.group import GroupRules, TreeId, grow_group
from collab_megatron.rollout.group_futures import AutoFutures
from collab_megatron.rollout.journal.store import Journal
from collab_megatron.rollout.journaled_engine import JournaledEngine
from collab_megatron.rollout.metrics import rollout_metrics
from collab_megatron.rollout.rewards.noise import futures_variance, noise_variance, undecided
from collab_megatron.rollout.tree_grower import tree_calls
from collab_megatron.types import Group, Message, ScoredConversation
from tests.rollout.fakes import LIMITS, TASK, LengthScorer, ScriptedEngine, ScriptedUser, players, policy_turn

AUTO = AutoFutures(most=6, tree=9)  # three replies, auto_futures: 3
RULES = GroupRules(
    num_replies=3,
    num_futures=2,
    min_replies=2,
    min_futures=1,
    group_timeout_s=60,
    advantage_eps=0.05,
    min_group_std=0.01,
    equal_replies="once",
)


class SampleScorer(LengthScorer):
    """Scores a conversation by its reply and the number of its future."""

    def __init__(self, score: Callable[[str, int], float], stride: int) -> None:
        super().__init__()
        self._score, self._stride = score, stride

    async def score(self, conversation: ScoredConversation) -> dict[str, float]:
        self.seen.append(conversation)
        reply = conversation.messages[conversation.num_prompt_messages].content
        return {"accuracy": self._score(reply, conversation.sample_index % self._stride)}


def goes_on(chat: Sequence[Message], sample_index: int) -> str:
    return "go on" if len(chat) < 4 else "[TERMINATE]"


async def grow(
    texts: Sequence[str], score: Callable[[str, int], float], *, engine: Any = None, **rules: Any
) -> tuple[Group, SampleScorer]:
    grown_by = replace(RULES, **rules)
    scorer = SampleScorer(score, grown_by.auto.most if grown_by.auto else grown_by.num_futures)
    cast = players(engine or ScriptedEngine(["ok"]), ScriptedUser(goes_on), scorer)
    turns = [policy_turn(text) for text in texts]
    group = await grow_group(TASK, (1, 2), turns, TreeId(0, 0), rules=grown_by, limits=LIMITS, players=cast)
    return group, scorer


def test_variances_by_hand() -> None:
    assert futures_variance([[1.0, 0.0], [0.5, 0.5], [3.0]]) == pytest.approx((0.5 + 0.0) / 2)
    assert futures_variance([[1.0], [0.0]]) is None
    assert noise_variance([[1.0, 0.0], [0.5, 0.5]], [1, 1]) == pytest.approx(0.25 / 2)  # v / K
    assert noise_variance([[1.0, 0.0], [0.5, 0.5]], [3, 1]) == pytest.approx(4 / 3 * 2 * 0.75 * 0.25 * 0.125)
    assert noise_variance([[1.0, 0.0]], [4]) == 0.0  # equal replies have no difference to explain
    assert noise_variance([[1.0], [0.0]], [1, 1]) is None


@pytest.mark.parametrize("copies", [(1, 1, 1, 1), (5, 1, 1, 1)])
def test_the_noise_variance_is_the_spread_of_replies_that_do_not_differ(copies: tuple[int, ...]) -> None:
    """Mean over 4000 groups whose futures all have one distribution: the estimate is what is seen between replies."""
    chance = random.Random(3)
    seen, estimated = [], []
    for _ in range(4000):
        rewards = [[chance.gauss(0.0, 1.0) for _ in range(3)] for _ in copies]
        mrs = [statistics.fmean(own) for own, count in zip(rewards, copies, strict=True) for _ in range(count)]
        seen.append(statistics.variance(mrs))
        estimated.append(noise_variance(rewards, copies) or 0.0)
    assert statistics.fmean(estimated) == pytest.approx(statistics.fmean(seen), rel=0.05)


async def test_the_dashboard_tells_signal_from_noise() -> None:
    def clear(reply: str, future: int) -> float:
        return float(reply == "a") + 0.1 * (future % 2)

    def blurred(reply: str, future: int) -> float:
        return 0.1 * (reply == "a") + float(future % 2)

    told, hidden = [
        values(rollout_metrics([(await grow(["a", "b", "c"], score))[0]], {"accuracy": 1.0}))["advantage/noise_share"]
        for score in (clear, blurred)
    ]
    assert told == pytest.approx((0.1**2 / 2 / 2) / (1 / 3), rel=1e-6)
    assert hidden == 1.0


async def test_copies_and_pools_count_as_one_estimate() -> None:
    def score(reply: str, future: int) -> float:
        return float(reply == "a") + future

    for mode, count in (("once", 2), ("pool", 4)):
        group, _ = await grow(["a", "b", "a"], score, equal_replies=mode)
        figures = values(rollout_metrics([group], {"accuracy": 1.0}))
        share, v = 2 / 3, futures_variance([[1.0, 2.0] * (count // 2), [0.0, 1.0]])
        assert v is not None
        noise = 3 / 2 * share * (1 - share) * (v / count + v / 2)
        assert figures["advantage/noise_share"] == pytest.approx(min(noise, 1 / 3) / (1 / 3))


def test_undecided_replies_are_those_that_one_more_future_can_pass() -> None:
    close, far = [0.5, 0.7], [3.0, 3.2]
    assert undecided([close, [0.55, 0.75], far]) == [0, 1]
    assert undecided([close, far]) == []
    assert undecided([close, [0.55, 0.75], [0.9, 1.1]]) == [0, 1]  # sqrt(0.02 / 6) is 0.058
    assert undecided([[0.5, 0.5], [0.5, 0.5]]) == []  # futures do not differ: nothing to learn from more
    assert undecided([[0.0, 1.0], []]) == []  # the other has no reward
    assert undecided([[1.0], [1.0]]) == []  # no variance is known


async def test_auto_stops_where_the_ranking_is_clear() -> None:
    group, scorer = await grow(["a", "b", "c"], lambda reply, k: ord(reply) + 0.1 * (k % 2), auto=AUTO)
    assert len(scorer.seen) == 6
    assert [len(reply.futures_K) for reply in group.replies_G] == [2, 2, 2]


async def test_auto_gives_the_futures_to_close_replies_and_keeps_its_bounds() -> None:
    def score(reply: str, future: int) -> float:
        return 5.0 + 0.1 * (future % 2) if reply == "c" else float(future % 2)

    group, scorer = await grow(["a", "b", "c"], score, auto=AUTO)
    counts = [len(reply.futures_K) for reply in group.replies_G]
    assert counts[2] == 2
    assert sum(counts) == len(scorer.seen) <= AUTO.tree
    assert sum(counts) >= 8
    names = [conversation.sample_index for conversation in scorer.seen]
    assert len(set(names)) == len(names)
    assert [f.index for f in group.replies_G[0].futures_K] == list(range(counts[0]))
    copied, scorer = await grow(["a", "b", "a"], score, auto=AUTO)
    assert len(scorer.seen) <= AUTO.tree
    assert len(copied.replies_G[0].futures_K) == len(copied.replies_G[2].futures_K) <= AUTO.most
    _, scorer = await grow(["a", "a", "a"], score, auto=AUTO)
    assert len(scorer.seen) == 1


async def test_a_resumed_tree_finds_the_futures_of_all_rounds(tmp_path: Path) -> None:
    def score(reply: str, future: int) -> float:
        return float(future % 2)

    with closing(Journal(tmp_path / "j.sqlite", replay="auto", lineage="t")) as book:
        groups = []
        for _ in range(2):
            sampler = ScriptedEngine(["ok"])
            engine = JournaledEngine(sampler, book, AdaptiveLimiter(1e9), max_staleness=0)
            group, _ = await grow(["a", "b", "c"], score, engine=engine, auto=AUTO)
            groups.append([[f.messages for f in reply.futures_K] for reply in group.replies_G])
    assert sampler.contexts == []  # the second attempt samples nothing
    assert groups[0] == groups[1]


def test_the_budget_reserves_what_auto_may_play() -> None:
    auto = RolloutSection(num_replies=4, num_repeat_rollouts="auto", auto_futures=3)
    assert (auto.first_futures, auto.most_futures, auto.tree_futures) == (2, 6, 12)
    fixed = RolloutSection(num_replies=4, num_repeat_rollouts=3)
    assert tree_calls(auto, judges=2) == tree_calls(fixed, judges=2) == 12 * (2 + 2)
    assert tree_calls(RolloutSection(num_replies=4, num_repeat_rollouts=0), judges=2) == 4 * 2
