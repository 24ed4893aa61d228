"""The three trees of a step that the dashboard shows as text."""

from __future__ import annotations

from dataclasses import replace

import pytest

from collab_megatron.figures import best_median_worst
from collab_megatron.rollout.shown_trees import LONGEST_MESSAGE, LONGEST_TREE, shown_trees
from collab_megatron.types import Future, Group, Message, Reply, RolloutStatus
from tests.rollout.fakes import TASK, policy_turn


def tree(name: str, *rewards: float | None, says: str = "Which day?") -> Group:
    messages = (Message("user", "Monday."), Message("assistant", "Booked."))
    futures = (Future(0, RolloutStatus.TERMINATED, messages), Future(1, RolloutStatus.MAX_TURNS, ()))
    replies = tuple(Reply(policy_turn(says), futures, mr=reward, advantage=reward) for reward in rewards)
    return Group(replace(TASK, task_id=name), (1,), replies, kept=True)


@pytest.mark.parametrize(
    ("values", "chosen"),
    [
        ((), ()),
        ((3,), (3,)),
        ((1, 3), (3, 1)),
        ((2, 1, 3), (3, 2, 1)),
        ((4, 1, 2, 3), (4, 3, 1)),
        ((5, 5, 5), (5, 5, 5)),
    ],
)
def test_best_median_and_worst(values: tuple[float, ...], chosen: tuple[float, ...]) -> None:
    assert best_median_worst(values, float) == chosen


def test_trees_are_ranked_by_the_mean_of_their_scored_replies() -> None:
    shown = shown_trees([tree("low", 0.0, 0.2), tree("high", 1.0, None), tree("middle", 0.5, 0.7), tree("none", None)])
    assert [each.mr for each in shown] == pytest.approx([1.0, 0.6, 0.1])
    assert [each.text.partition(":")[0] for each in shown] == ["task high", "task middle", "task low"]


def test_a_tree_reads_as_a_conversation() -> None:
    group = tree("t", 0.5, None)
    first, second = group.replies_G
    same = replace(first, same_as=0, advantage=-1.0)
    (shown,) = shown_trees([replace(group, replies_G=(first, second, same))])
    assert shown.text.splitlines() == [
        "task t: mean reward 0.500 of 2 scored replies",
        "",
        "  user: book a table",
        "",
        "reply 1: reward 0.500, advantage +0.50",
        "  assistant: Which day?",
        "    user: Monday.",
        "    assistant: Booked.",
        "    (terminated; 1 more)",
        "",
        "reply 2: no reward",
        "  assistant: Which day?",
        "    user: Monday.",
        "    assistant: Booked.",
        "    (terminated; 1 more)",
        "",
        "reply 3: reward 0.500, advantage -1.00",
        "    the same as reply 1",
    ]


def test_long_and_broken_texts_stay_short_and_can_be_sent() -> None:
    (long,) = shown_trees([tree("t", 1.0, says="x" * 10**6)])
    assert "x" * LONGEST_MESSAGE + "..." in long.text
    (many,) = shown_trees([tree("t", *[1.0] * 100, says="y" * 500)])
    assert len(many.text) <= LONGEST_TREE + 4
    (half,) = shown_trees([tree("t", 1.0, says="\ud83d")])
    assert half.text.encode()
