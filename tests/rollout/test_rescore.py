"""A record under another reward: what is read, what is asked again, and the advantages that come of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from collab_megatron import rescore
from collab_megatron.config import RLConfig
from collab_megatron.errors import UserError
from collab_megatron.rollout.group import TreeId
from collab_megatron.rollout.llm import SimulatorError
from collab_megatron.rollout.record_files import steps_of
from collab_megatron.rollout.record_lines import tree_line, tree_record
from collab_megatron.rollout.recorded_groups import group_of
from collab_megatron.types import Future, Group, Message, Reply, RolloutStatus, ScoredConversation
from tests.rollout.fakes import TASK, policy_turn

TREE_ID = TreeId(3, 1)


def config(**reward: Any) -> RLConfig:
    return RLConfig.model_validate(
        {
            "model": {"path": "m"},
            "data": {"train": "t"},
            "simulators": {"user": {"model": "u"}, "judge": {"model": "j"}},
            "rollout": {"num_replies": 2, "min_replies": 2},
            "reward": {"metric_weights": {"accuracy": 1.0, "token_amount": -0.1}, **reward},
        }
    )


def future(index: int, accuracy: float | None, tokens: float) -> Future:
    messages = (Message("user", "Monday."), Message("assistant", "Booked."))
    if accuracy is None:
        return Future(index, RolloutStatus.SIMULATOR_FAILED, (), error="the user is gone")
    scores = {"accuracy": accuracy, "token_amount": tokens}
    turns = (policy_turn("Booked."),)
    return Future(index, RolloutStatus.TERMINATED, messages, scores, 0.0, policy_tokens=9, turns=turns)


def group(*accuracies: Sequence[float | None]) -> Group:
    """A reply with as many futures as it has accuracies; the second has many tokens."""
    replies = [
        Reply(policy_turn(f"Which day, {g}?"), tuple(future(k, accuracy, 5.0 * g) for k, accuracy in enumerate(own)))
        for g, own in enumerate(accuracies)
    ]
    return Group(TASK, (1, 2), tuple(replies), kept=True)


def row_of(tree: Group) -> dict[str, Any]:
    line: dict[str, Any] = json.loads(tree_line(4, tree, TREE_ID, replaced=False, trained=True))
    return line


class Gateway:
    """Asked by nobody, or by metrics that count what they score."""

    def role(self, name: str) -> Any:
        return name


async def rescored(tree: Group, given: RLConfig, *again: str) -> tuple[Group, rescore.Changes]:
    changes = rescore.Changes()
    found = await rescore.Rescorer(given, Gateway(), again, changes).group(tree)  # type: ignore[arg-type]
    return found, changes


def test_a_recorded_tree_is_read_as_it_was_written() -> None:
    tree = group((1.0, 0.0), (1.0, None))
    row = row_of(tree)
    again = group_of(row, {})
    assert tree_record(again) == tree_record(tree)
    assert again.task.ambiguous is True
    assert group_of(row, {TASK.task_id: TASK}).task is TASK


async def test_other_weights_make_other_rewards_and_advantages() -> None:
    tree = group((1.0, 0.0), (1.0, 1.0))
    before, _ = await rescored(tree, config())
    assert [reply.mr for reply in before.replies_G] == [0.5, 0.5]  # (1 + 0) / 2, and 1 - 0.1 * 5
    after, changes = await rescored(before, config(metric_weights={"accuracy": 1.0}))
    assert [reply.mr for reply in after.replies_G] == [0.5, 1.0]
    advantages = [reply.advantage for reply in after.replies_G]
    assert advantages[0] == pytest.approx(-(advantages[1] or 0.0))
    assert (advantages[1] or 0.0) > 0.5
    assert (changes.trees, changes.best_changed, changes.conversations) == (1, 1, 0)
    assert "best reply  another one in 1 of 1 trees" in changes.lines({"accuracy": 1.0})


async def test_only_what_is_missing_or_asked_for_again_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[frozenset[str], ScoredConversation]] = []

    class Scorer:
        def __init__(self, names: frozenset[str]) -> None:
            self.names = names

        async def score(self, conversation: ScoredConversation) -> dict[str, float]:
            asked.append((self.names, conversation))
            if "gone" in conversation.messages[-1].content:
                raise SimulatorError("the judge is gone")
            return dict.fromkeys(self.names, 0.25)

    monkeypatch.setattr(rescore, "configured_scorer", lambda section, *_: Scorer(frozenset(section.metric_weights)))
    weights = {"accuracy": 1.0, "turn_count": 1.0}
    found, changes = await rescored(group((1.0, None), (0.0, 1.0)), config(metric_weights=weights))
    assert {names for names, _ in asked} == {frozenset({"turn_count"})}
    assert changes.conversations == len(asked) == 3  # not the future that its user left
    assert [message.content for message in asked[0][1].messages] == [
        *(message.content for message in TASK.prompt),
        *("Which day, 0?", "Monday.", "Booked."),
    ]
    assert (asked[0][1].num_prompt_messages, asked[0][1].policy_tokens) == (1, 9)
    assert [reply.mr for reply in found.replies_G] == [1.25, 0.75]
    assert found.replies_G[0].futures_K[1].status is RolloutStatus.SIMULATOR_FAILED

    asked.clear()
    await rescored(group((1.0, 1.0), (0.0, 1.0)), config(metric_weights=weights), "accuracy")
    assert {names for names, _ in asked} == {frozenset(weights)}


async def test_a_judge_that_fails_costs_the_future_and_can_be_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[float | None] = [None, 1.0, 1.0, 1.0]

    class Scorer:
        async def score(self, _: ScoredConversation) -> dict[str, float]:
            value = answers.pop(0)
            if value is None:
                raise SimulatorError("the judge is gone")
            return {"turn_count": value}

    monkeypatch.setattr(rescore, "configured_scorer", lambda *_: Scorer())
    given = config(metric_weights={"turn_count": 1.0})
    found, changes = await rescored(group((1.0, 1.0), (0.0, 1.0)), given)
    broken = found.replies_G[0].futures_K[0]
    assert (broken.status, broken.reward, changes.failed) == (RolloutStatus.JUDGE_FAILED, None, 1)
    assert [reply.mr for reply in found.replies_G] == [1.0, 1.0]
    answers[:] = [0.0]
    fixed, _ = await rescored(group_of(row_of(found), {}), given)
    assert [reply.mr for reply in fixed.replies_G] == [0.5, 1.0]
    assert answers == []


def test_nobody_is_asked_for_where_the_record_has_every_score() -> None:
    rows = [row_of(group((1.0, 0.0), (1.0, None)))]
    assert rescore.asked_roles(config(), rows, ()) == {}
    assert set(rescore.asked_roles(config(), rows, ("accuracy",))) == {"judge"}
    other = config(metric_weights={"accuracy": 1.0, "interactivity": 1.0})
    assert set(rescore.asked_roles(other, rows, ())) == {"judge"}


@pytest.mark.parametrize(("text", "steps"), [("7", range(7, 8)), ("5-20", range(5, 21)), ("5-", range(5, 2**31 + 1))])
def test_steps(text: str, steps: range) -> None:
    assert steps_of(text, "--steps") == steps


@pytest.mark.parametrize("text", ["x", "-5", "5-x", "1,2", ""])
def test_steps_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="is no step or range of steps"):
        steps_of(text, "--steps")


async def test_the_penalty_of_a_reply_that_breaks_off_stays() -> None:
    tree = group((1.0, 1.0), (1.0, 1.0))
    cut = replace(tree.replies_G[0], futures_K=(replace(future(0, 1.0, 0.0), scores={}, reward=-1.0),))
    found, changes = await rescored(replace(tree, replies_G=(cut, tree.replies_G[1])), config())
    assert [reply.mr for reply in found.replies_G] == [-1.0, 0.5]
    assert changes.conversations == 0


def test_an_existing_output_is_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out.jsonl").write_text("mine")
    argv = ["rescore", "conf/demo_rl.yaml", "--record", str(tmp_path), "--output", str(tmp_path / "out.jsonl")]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(UserError, match="exists: choose another file"):
        rescore.main()
    assert (tmp_path / "out.jsonl").read_text() == "mine"
