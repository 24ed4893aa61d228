"""Scores, rewards and metrics, with a small fake judge."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from collab_megatron.config.sections import LLMSection, RewardSection, SimulatorsSection, UserSection
from collab_megatron.errors import UserError
from collab_megatron.rollout.llm import Gateway, SimulatorError
from collab_megatron.rollout.rewards import (
    MetricContext,
    Scorer,
    asks_question,
    clamped_shares,
    configured_scorer,
    conversation_reward,
    make_scorer,
    multiturn_reward,
    register_metric,
)
from collab_megatron.rollout.rewards.registry import _FACTORIES
from collab_megatron.types import Future, LLMRequest, Message, Metric, RolloutStatus, ScoredConversation, T, Task


class FakeJudge:
    """Answers each prompt with `reply(prompt)`."""

    def __init__(self, reply: Callable[[str], Any]) -> None:
        self._reply = reply
        self.prompts: list[str] = []

    async def complete(self, request: LLMRequest[T]) -> list[T]:
        (message,) = request.messages
        self.prompts.append(message.content)
        return [request.parse(json.dumps(self._reply(message.content)))]


def conversation(answer: str, truth: str = "BOOK size 4") -> ScoredConversation:
    messages = (Message("user", "a table"), Message("assistant", answer), Message("user", "bye"))
    return ScoredConversation(Task("t", messages[:1], "a table for 4", truth), messages, 1, policy_tokens=1500)


def future(status: RolloutStatus, reward: float | None, **scores: float) -> Future:
    return Future(0, status, (), scores, reward)


def score(scorer: Scorer, scored: ScoredConversation) -> dict[str, float]:
    return asyncio.run(scorer.score(scored))


def test_conversation_reward_clamps_each_metric() -> None:
    weights = {"a": 1.0, "b": -3.0, "c": 0.5}
    assert conversation_reward({"a": 0.5, "b": 1.0, "c": 1.0, "unweighted": 9.0}, weights) == 0.5 - 1.0 + 0.5
    with pytest.raises(KeyError):
        conversation_reward({"a": 1.0}, weights)


def test_mr_is_the_mean_of_what_is_scored() -> None:
    futures = [
        future(RolloutStatus.TERMINATED, 1.0),
        future(RolloutStatus.MAX_TURNS, 0.0),
        future(RolloutStatus.JUDGE_FAILED, None),
        future(RolloutStatus.SIMULATOR_FAILED, None),
        future(RolloutStatus.TRUNCATED, 2.0),
    ]
    assert multiturn_reward(futures) == 1.0
    assert multiturn_reward(futures[2:4]) is None
    assert multiturn_reward([]) is None


def test_share_at_the_clamp() -> None:
    futures = [
        future(RolloutStatus.TERMINATED, 0.0, tokens=3.0),
        future(RolloutStatus.TERMINATED, 0.0, tokens=2.0),  # reaches the limit: nothing is lost
        future(RolloutStatus.JUDGE_FAILED, None),
    ]
    assert clamped_shares(futures, {"tokens": -0.5}) == {"": 0.5, "tokens": 0.5}
    assert clamped_shares([], {"tokens": 1.0}) == {"": 0.0, "tokens": 0.0}


@pytest.mark.parametrize(
    ("text", "asks"), [("which day?", True), ("a? b", True), ("quand ？", True), ("done.", False), ("", False)]
)
def test_asks_question(text: str, asks: bool) -> None:
    assert asks_question(text) is asks


def test_exact_accuracy_and_token_amount_need_no_judge() -> None:
    scorer = make_scorer({"accuracy": 1.0, "token_amount": -0.1}, None, accuracy_verifier="exact")
    scores = score(scorer, conversation(" BOOK  size\n4 "))
    assert scores == {"accuracy": 1.0, "token_amount": 1.5}
    assert scorer.reward(scores) == pytest.approx(0.85)
    assert score(scorer, conversation("BOOK size 5"))["accuracy"] == 0.0
    assert score(scorer, conversation("", truth=""))["accuracy"] == 0.0


def test_judged_metrics() -> None:
    judge = FakeJudge(
        lambda prompt: (
            {"correct": False}
            if "<reference>" in prompt
            else {"thought": "", "understanding": 1, "clarification": "0.5", "suggestion": 0.0}
        )
    )
    scorer = make_scorer({"accuracy": 1.0, "interactivity": 1.0}, judge)
    assert score(scorer, conversation("hi {there}")) == {"accuracy": 0.0, "interactivity": 0.5}
    assert all("hi {there}" in prompt and "a table for 4" in prompt for prompt in judge.prompts)


def test_every_judges_prompt_can_be_replaced(tmp_path: Path) -> None:
    accuracy, interactivity = tmp_path / "accuracy.txt", tmp_path / "interactivity.txt"
    accuracy.write_text("mine: $request $reference $chat")
    interactivity.write_text("yours: $request $chat")
    judge = FakeJudge(
        lambda prompt: {
            "correct": prompt.startswith("mine"),
            **dict.fromkeys(("understanding", "clarification", "suggestion"), float(prompt.startswith("yours"))),
        }
    )
    weights = {"accuracy": 1.0, "interactivity": 1.0}
    scorer = make_scorer(weights, judge, prompt_files={"interactivity": interactivity, "accuracy": accuracy})
    assert score(scorer, conversation("x")) == {"accuracy": 1.0, "interactivity": 1.0}

    llm = LLMSection(model="m", api_key_env=None, prompt_file=interactivity)
    simulators = SimulatorsSection(user=UserSection(model="m"), judge=llm)
    reward = RewardSection(accuracy_prompt_file=tmp_path / "none.txt")
    with pytest.raises(UserError, match=r"none\.txt cannot be read"):
        configured_scorer(reward, simulators, Gateway({"judge": llm}, 1))


def test_a_failing_metric_fails_the_conversation_and_stops_the_others() -> None:
    ended: list[str] = []

    class Slow:
        name = "slow"

        async def score(self, conversation: ScoredConversation) -> float:
            try:
                await asyncio.sleep(30)
            finally:
                ended.append("slow")
            return 1.0

    class Broken:
        name = "broken"

        async def score(self, conversation: ScoredConversation) -> float:
            raise SimulatorError("judge gave up")

    with pytest.raises(SimulatorError, match="judge gave up"):
        score(Scorer([Slow(), Broken()], {"slow": 1.0, "broken": 1.0}), conversation("x"))
    assert ended == ["slow"]


def test_metrics_run_beside_each_other() -> None:
    class Meet:
        def __init__(self, name: str, barrier: asyncio.Barrier) -> None:
            self.name, self._barrier = name, barrier

        async def score(self, conversation: ScoredConversation) -> float:
            async with asyncio.timeout(5):
                await self._barrier.wait()
            return 1.0

    async def main() -> dict[str, float]:
        barrier = asyncio.Barrier(2)
        scorer = Scorer([Meet("a", barrier), Meet("b", barrier)], {"a": 1.0, "b": 1.0})
        return await scorer.score(conversation("x"))

    assert asyncio.run(main()) == {"a": 1.0, "b": 1.0}


def test_a_metric_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("collab_megatron.rollout.rewards.registry._FACTORIES", dict(_FACTORIES))

    class Constant:
        name = "constant"

        async def score(self, conversation: ScoredConversation) -> float:
            return 0.25

    @register_metric("constant")
    def constant(context: MetricContext) -> Metric:
        return Constant()

    assert score(make_scorer({"constant": 2.0}, None), conversation("x")) == {"constant": 0.25}
    with pytest.raises(ValueError, match="already registered"):
        register_metric("constant")(constant)


def test_what_cannot_be_scored_is_a_user_error() -> None:
    with pytest.raises(UserError, match="unknown metric 'bleu'"):
        make_scorer({"bleu": 1.0}, None)
    for name in ("accuracy", "interactivity"):
        with pytest.raises(UserError, match=f"{name} needs an LLM judge"):
            make_scorer({name: 1.0}, None)
    with pytest.raises(ValueError, match="same metrics"):
        Scorer([], {"a": 1.0})
