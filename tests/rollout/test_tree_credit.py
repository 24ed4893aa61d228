"""Tree credit: returns, baselines and samples of the later policy turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from collab_megatron.figures import values
from collab_megatron.rollout.batch_collector import _require_versions
from collab_megatron.rollout.future import Players
from collab_megatron.rollout.group import GroupRules, TreeId, grow_group, has_spread, training_samples
from collab_megatron.rollout.metrics import rollout_metrics
from collab_megatron.rollout.record_lines import tree_record
from collab_megatron.rollout.tree_credit import TreeBaseline, _Conversation, turn_advantages
from collab_megatron.types import Generation, Group, Message, ScoredConversation
from tests.rollout.fakes import END, LIMITS, TASK, LengthScorer, ScriptedUser, generation, players, policy_turn

RULES = GroupRules(
    num_replies=2,
    num_futures=2,
    min_replies=2,
    min_futures=1,
    group_timeout_s=60,
    advantage_eps=0.05,
    min_group_std=0.01,
    equal_replies="once",
    tree_baseline="siblings",
)
EPS = 1e-9


class TextEngine:
    """Answers a context by the name of the turn: {name: text}."""

    def __init__(self, **texts: str) -> None:
        self.texts = texts

    async def generate(self, input_ids: Sequence[int], *, name: str, **asked: Any) -> list[Generation]:
        return [generation(self.texts.get(name.replace("/", "_"), "ok"), version=3)]


class WordScorer(LengthScorer):
    """1 for a conversation whose last policy turn is `good`."""

    async def score(self, conversation: ScoredConversation) -> dict[str, float]:
        self.seen.append(conversation)
        return {"accuracy": float(conversation.last_assistant == "good")}


def asks_then_ends(chat: Sequence[Message], sample_index: int) -> str:
    return "and?" if sum(message.role == "user" for message in chat) < 2 else "[TERMINATE]"


async def grow(texts: Sequence[str], engine: TextEngine, **rules: Any) -> Group:
    cast: Players = replace(players(None, ScriptedUser(asks_then_ends), WordScorer()), engine=engine)  # type: ignore[arg-type]
    return await grow_group(
        TASK,
        (1, 2),
        [policy_turn(text, version=3) for text in texts],
        TreeId(3, 1, name="t"),
        rules=replace(RULES, **rules),
        limits=replace(LIMITS, keep_contexts=True),
        players=cast,
    )


def by_hand(
    baseline: TreeBaseline, *conversations: tuple[int, Sequence[tuple[str, str]], float], **how: Any
) -> dict[tuple[str, str], float]:
    """Advantages by (context, text), in units of the std."""

    def ids(text: str) -> tuple[int, ...]:
        return tuple(map(ord, text))

    listed = [
        _Conversation(reply, tuple((ids(context), ids(own)) for context, own in turns), reward)
        for reply, turns, reward in conversations
    ]
    found = turn_advantages(listed, eps=EPS, min_std=0.01, baseline=baseline, **how)
    return {("".join(map(chr, context)), "".join(map(chr, own))): a for (context, own), a in found.items()}


def test_the_groups_baseline_is_the_mean_of_the_other_conversations() -> None:
    found = by_hand("group", (0, [("a1", "x")], 1.0), (0, [("a2", "y")], 0.0), (1, [("b1", "z")], 0.0))
    std = (1 / 3) ** 0.5
    assert found == pytest.approx({("a1", "x"): 1 / std, ("a2", "y"): -0.5 / std, ("b1", "z"): -0.5 / std})


def test_siblings_shrink_towards_reply_and_group() -> None:
    """Reply 0 has three conversations, two of them with the same user turn (context `a1`)."""
    found = by_hand(
        "siblings",
        (0, [("a1", "x")], 1.0),
        (0, [("a1", "y")], 0.0),
        (0, [("a2", "z")], 0.5),
        (1, [("b1", "w")], 0.0),
    )
    std = 0.22916666666666666**0.5  # of 1, 0, 0.5, 0
    root = (0.0 + 0.5 + 0.0) / 3
    reply = (0.0 + 0.5 + root) / 3
    context = (0.0 + reply) / 2
    assert found["a1", "x"] == pytest.approx((1.0 - context) / std)
    root = (1.0 + 0.5 + 0.0) / 3
    reply = (1.0 + 0.5 + root) / 3
    assert found["a1", "y"] == pytest.approx((0.0 - (1.0 + reply) / 2) / std)
    assert found["b1", "w"] == pytest.approx((0.0 - 0.5) / std)  # alone below its reply: the group's mean


def test_a_turn_of_several_conversations_returns_their_mean() -> None:
    conversations = [
        (0, [("a1", "x"), ("a1x1", "p")], 1.0),
        (0, [("a1", "x"), ("a1x2", "q")], 0.0),
        (1, [("b1", "z")], 0.0),
    ]
    found = by_hand("group", *conversations)
    std = (1 / 3) ** 0.5
    assert found["a1", "x"] == pytest.approx((0.5 - 0.0) / std)  # against the one conversation that is not below it
    assert found["a1x1", "p"] == pytest.approx((1.0 - 0.0) / std)
    deep = by_hand("siblings", *conversations)
    root, above = 0.0, 0.0  # p's others: q and z
    for rest in ([0.0], [0.0], [], [0.0]):
        above = (sum(rest) + above) / (len(rest) + 1)
    assert deep["a1x1", "p"] == pytest.approx((1.0 - above) / std)
    assert root == 0.0


@pytest.mark.parametrize("baseline", ["siblings", "group"])
def test_a_baseline_does_not_depend_on_its_own_turn(baseline: TreeBaseline) -> None:
    """An own reward that rises by 1 raises return and advantage by 1, in units of the std."""

    def advantage(own: float) -> float:
        rewards = [own, 0.25, 1.0, 0.0]
        mean = sum(rewards) / 4
        std = (sum((reward - mean) ** 2 for reward in rewards) / 3) ** 0.5
        found = by_hand(
            baseline,
            (0, [("a1", "x")], own),
            (0, [("a1", "y")], 0.25),
            (0, [("a2", "z")], 1.0),
            (1, [("b1", "w")], 0.0),
        )
        return found["a1", "x"] * std

    assert advantage(0.75) - advantage(-0.25) == pytest.approx(1.0)


def test_without_spread_there_is_no_signal() -> None:
    assert set(by_hand("siblings", (0, [("a", "x")], 0.5), (1, [("b", "y")], 0.501)).values()) == {0.0}
    assert by_hand("siblings", (0, [("a", "x")], 0.5)) == {("a", "x"): 0.0}


def test_without_division_advantages_are_differences_of_rewards() -> None:
    conversations = ((0, [("a1", "x")], 1.0), (0, [("a2", "y")], 0.0), (1, [("b1", "z")], 0.0))
    found = by_hand("group", *conversations, divides=False)
    assert found == pytest.approx({("a1", "x"): 1.0, ("a2", "y"): -0.5, ("b1", "z"): -0.5})


def test_a_long_later_turn_is_compared_with_its_lost_reward() -> None:
    """Rewards are equal; the second turn of the first conversation loses 0.5, and the second conversation has none."""
    listed = [
        _Conversation(0, (((1,), (2,)), ((1, 2), (3,))), 1.0, shaping=(0.0, -0.5)),
        _Conversation(1, (((4,), (5,)),), 1.0, shaping=(0.0,)),
    ]
    found = turn_advantages(listed, eps=EPS, min_std=0.01, baseline="group", divides=False)
    assert found == pytest.approx({((1,), (2,)): 0.0, ((4,), (5,)): 0.0, ((1, 2), (3,)): -0.5})


async def test_later_turns_follow_scale_and_overlong_shaping_of_the_algorithm() -> None:
    """Later turns of 5 tokens (`good`) and 3 (`ok`), of at most 5, the last 2 of which cost up to 1."""
    engine = TextEngine(t_0_0_1="good", t_1_1_1="good")
    plain = await grow(["a", "b"], engine, tree_baseline="group", scale="none")
    shaped = await grow(
        ["a", "b"], engine, tree_baseline="group", scale="none", overlong_share=0.4, overlong_penalty=1.0, longest=5
    )

    def later(group: Group) -> list[float]:
        futures = [future for reply in group.replies_G for future in reply.futures_K]
        return [a for future in futures for a in future.advantages if a is not None]

    assert later(plain) == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])
    assert later(shaped) == pytest.approx([0.0] * 4)  # what `good` wins it loses by its length
    assert {sample.group for sample in training_samples(plain, "keep")} == {"t"}


async def test_every_policy_turn_is_a_sample_with_the_context_that_it_was_sampled_after() -> None:
    group = await grow(["a", "b"], TextEngine(t_0_0_1="good", t_1_1_1="good", t_1_0_1="bad!"))
    samples = training_samples(group, "keep")
    assert len(samples) == 2 + 4 - 0
    context = (1, 2, ord("a"), END, *map(ord, "and?"))
    later = {sample.reply_ids_T: sample for sample in samples if sample.prompt_ids == context}
    assert sorted(later) == sorted([generation("good").token_ids_T, generation("ok").token_ids_T])
    good, other = later[generation("good").token_ids_T], later[generation("ok").token_ids_T]
    assert good.advantage > 0 > other.advantage
    assert good.versions_T == (3,) * 5
    _require_versions(samples, 3, 0)
    figures = values(rollout_metrics([group], {"accuracy": 1.0}))
    assert figures["advantage/later_turns_std"] > 0
    recorded = tree_record(group)["replies"][0]["futures"][0]["turns"]
    assert [turn["advantage"] for turn in recorded] == [good.advantage]
    assert all(reply.advantage == 0.0 for reply in group.replies_G)  # equal means
    assert has_spread(group)  # and yet something to learn


async def test_equal_turns_have_one_advantage_and_count_as_often_as_they_are_there() -> None:
    group = await grow(["a", "b"], TextEngine(t_0_0_1="good", t_0_1_1="good"))
    samples = training_samples(group, "keep")
    assert len(samples) == 2 + 2 + 2
    assert len({(sample.prompt_ids, sample.reply_ids_T) for sample in samples}) == 4
    assert len(set(samples)) == 4


async def test_copies_of_a_reply_are_trained_with_their_later_turns() -> None:
    group = await grow(["a", "b", "a"], TextEngine(t_0_0_1="good"))
    samples = training_samples(group, "keep")
    assert len(samples) == 3 + 3 * 2
    assert len(set(samples)) == 2 + 2 + 1
    assert group.replies_G[2].futures_K[0].advantages == group.replies_G[0].futures_K[0].advantages


async def test_a_group_of_equal_replies_can_teach_its_later_turns() -> None:
    group = await grow(["a", "a"], TextEngine(t_0_0_1="good"))
    assert [reply.advantage for reply in group.replies_G] == [0.0, 0.0]
    assert has_spread(group)
    assert sorted(round(sample.advantage, 6) for sample in training_samples(group, "drop"))[0] < 0
    plain = await grow(["a", "a"], TextEngine(t_0_0_1="good"), tree_baseline=None)
    assert not has_spread(plain)


async def test_with_credit_for_replies_later_turns_are_no_samples() -> None:
    group = await grow(["a", "b"], TextEngine(t_0_0_1="good"), tree_baseline=None)
    assert len(training_samples(group, "keep")) == 2


async def test_turns_of_a_failed_future_and_of_a_dropped_group_are_not_trained() -> None:
    class HalfScorer(WordScorer):
        async def score(self, conversation: ScoredConversation) -> dict[str, float]:
            if conversation.last_assistant == "ok":
                raise AssertionError("a bug in a judge")
            return await super().score(conversation)

    cast = replace(players(None, ScriptedUser(asks_then_ends), HalfScorer()), engine=TextEngine(t_0_0_1="good"))  # type: ignore[arg-type]
    turns = [policy_turn(text, version=3) for text in ("a", "b")]
    limits = replace(LIMITS, keep_contexts=True)
    group = await grow_group(TASK, (1, 2), turns, TreeId(3, 1, name="t"), rules=RULES, limits=limits, players=cast)
    assert [[f.status.scored for f in reply.futures_K] for reply in group.replies_G] == [[True, False], [False, False]]
    assert not group.kept
    assert training_samples(group, "keep") == []
