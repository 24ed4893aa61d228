"""The table's rows: means, differences on common tasks, failures, wins."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from collab_megatron.config.sections import ComparisonSection
from collab_megatron.rollout.comparison import OWN_USER, Cell, Wins, cells_of, messages_of, table
from collab_megatron.rollout.evaluation import Evaluation
from collab_megatron.types import CallRecord, Future, Group, Message, Reply, RolloutStatus
from tests.rollout.fakes import TASK, policy_turn

WEIGHTS = {"accuracy": 1.0, "interactivity": 0.5, "token_amount": -0.1}
SECTION = ComparisonSection(resamples=200)


def conversation(number: int, accuracy: float | None, *, text: str = "when?", tokens: int = 500) -> Group:
    """None: it failed."""
    ambiguous = number % 2 == 0
    task = replace(
        TASK, task_id=f"t{number:02}", single_turn_prompt=f"request {number}", metadata={"ambiguous": ambiguous}
    )
    call = CallRecord("user", "m", 0.0, 1.0, requests=2, cost_usd=0.25, replayed=number == 0)
    if accuracy is None:
        future = Future(0, RolloutStatus.JUDGE_FAILED, (), error="judge is gone", calls=(call,))
        return Group(task, (), (Reply(policy_turn(text), (future,)),), kept=False, error="judge is gone")
    scores = {"accuracy": accuracy, "interactivity": 0.5, "token_amount": tokens / 1000}
    said = (Message("user", "at noon"), Message("assistant", "BOOK noon"))
    future = Future(0, RolloutStatus.MAX_TURNS, said, scores, reward=accuracy, policy_tokens=tokens, calls=(call,))
    return Group(task, (), (Reply(policy_turn(text), (future,), mr=accuracy),), kept=True)


def rows(*cells: Cell, baseline: str = "base") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = table(cells, WEIGHTS, SECTION, baseline=baseline, seed=1)["rows"]
    return found


def test_a_row_has_the_papers_columns() -> None:
    made = table(
        [Cell("rl", OWN_USER, [conversation(n, float(n < 3)) for n in range(4)])],
        WEIGHTS,
        SECTION,
        baseline="rl",
        seed=1,
    )
    assert made["columns"] == ["accuracy", "tokens_k", "interactivity", "mr", "asks_if_unclear", "asks_if_clear"]
    (row,) = made["rows"]
    accuracy = row["figures"]["accuracy"]
    assert (accuracy["mean"], accuracy["count"]) == (0.75, 4)
    assert 0.0 <= accuracy["low"] < 0.75 < accuracy["high"] <= 1.0
    assert row["figures"]["tokens_k"]["mean"] == 0.5
    assert row["figures"]["asks_if_unclear"]["count"] == 2
    assert row["difference"] == {}


def test_failed_conversations_are_counted_and_in_no_mean() -> None:
    (row,) = rows(Cell("rl", OWN_USER, [conversation(0, 1.0), conversation(1, None), conversation(2, 0.0)]))
    assert (row["conversations"], row["failed"]) == (3, 1)
    assert row["figures"]["accuracy"]["mean"] == 0.5
    (empty,) = rows(Cell("rl", OWN_USER, [conversation(0, None)]))
    assert (empty["figures"], empty["failed"]) == ({}, 1)


def test_differences_are_paired_by_task_and_user() -> None:
    base = Cell("base", OWN_USER, [conversation(n, 0.0 if n else None) for n in range(10)])
    other = Cell("base", "terse", [conversation(n, 1.0) for n in range(10)])
    rl = Cell("rl", OWN_USER, [conversation(n, 1.0, tokens=400) for n in range(8)])
    of_base, _, of_rl = rows(base, other, rl)
    assert of_base["difference"] == {}
    change = of_rl["difference"]["accuracy"]
    assert (change["mean"], change["count"]) == (1.0, 7)  # tasks 1 to 7: task 0 failed, 8 and 9 were not played
    assert of_rl["difference"]["tokens_k"]["mean"] == pytest.approx(-0.1)
    (alone,) = rows(rl)
    assert alone["difference"] == {}


def test_a_pairing_sees_a_change_that_the_spread_between_tasks_hides() -> None:
    values = [float(n % 7) for n in range(40)]
    base = Cell("base", OWN_USER, [conversation(n, value) for n, value in enumerate(values)])
    rl = Cell("rl", OWN_USER, [conversation(n, value + 0.5) for n, value in enumerate(values)])
    of_base, of_rl = rows(base, rl)
    assert of_rl["figures"]["accuracy"]["low"] < of_base["figures"]["accuracy"]["high"]
    assert of_rl["difference"]["accuracy"]["low"] == of_rl["difference"]["accuracy"]["high"] == 0.5


def test_the_order_of_the_conversations_does_not_matter() -> None:
    groups = [conversation(n, float(n % 3 == 0)) for n in range(12)]
    assert rows(Cell("rl", OWN_USER, groups)) == rows(Cell("rl", OWN_USER, groups[::-1]))


def test_wins_are_a_rate_with_counts() -> None:
    groups = [conversation(n, 1.0) for n in range(4)]
    wins = Wins({"t00": 1.0, "t01": 1.0, "t02": 0.5, "t03": 0.0}, failed=2, cost_usd=0.5)
    _, row = rows(Cell("base", OWN_USER, groups), Cell("rl", OWN_USER, groups, wins=wins))
    assert row["wins"]["rate"]["mean"] == 0.625
    counts = {name: row["wins"][name] for name in ("won", "tied", "lost", "failed")}
    assert counts == {"won": 2, "tied": 1, "lost": 1, "failed": 2}


def test_cells_have_the_calls_of_their_own_conversations() -> None:
    played = Evaluation({}, (conversation(0, 1.0), conversation(1, None)), 3, others={"terse": (conversation(0, 1.0),)})
    own, terse = cells_of("rl", played)
    assert (own.user, own.calls, own.cost_usd, own.replayed) == (OWN_USER, 4, 0.5, 1)
    assert (terse.user, terse.calls, terse.cost_usd) == ("terse", 2, 0.25)


def test_the_judge_sees_the_whole_conversation_without_system_messages() -> None:
    group = conversation(0, 1.0)
    task = replace(group.task, prompt=(Message("system", "be kind"), *group.task.prompt))
    said = [(message.role, message.content) for message in messages_of(replace(group, task=task))]
    assert said == [
        ("user", "book a table"),
        ("assistant", "when?"),
        ("user", "at noon"),
        ("assistant", "BOOK noon"),
    ]
