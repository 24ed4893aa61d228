"""The reward-hacking panel, and the second judge behind part of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest

from collab_megatron.config.cross_checks import check_metrics
from collab_megatron.config.roles import llm_roles, llms_of_conversations, role_place
from collab_megatron.config.sections import JudgeSection, RewardSection, RolloutSection, SimulatorsSection, UserSection
from collab_megatron.figures import merged, values
from collab_megatron.launch.cost import Lengths, future_calls
from collab_megatron.rollout.future import Players
from collab_megatron.rollout.group import TreeId, play_once
from collab_megatron.rollout.hacking import hacking_metrics, phrases_of
from collab_megatron.rollout.llm import Gateway, SimulatorError
from collab_megatron.rollout.record_lines import reply_record
from collab_megatron.rollout.rewards.scorer import Scorer
from collab_megatron.rollout.rewards.second_judge import SecondJudge, configured_second_judge, second_judge_calls
from collab_megatron.types import (
    Future,
    Group,
    LLMRequest,
    Message,
    Reply,
    RolloutStatus,
    Score,
    ScoredConversation,
    Task,
)
from tests.rollout.fakes import LIMITS, TASK, ScriptedEngine, ScriptedUser, players, policy_turn

CLEAR = replace(TASK, metadata={"ambiguous": False})
FOLLOW_UP = replace(CLEAR, prompt=(*CLEAR.prompt, Message("assistant", "ok"), Message("user", "and then")))
SIMULATORS = SimulatorsSection(user=UserSection(model="u"), judge=JudgeSection(model="j"))
REWARD = RewardSection(second_judge=JudgeSection(model="other"), second_judge_share=0.25)


def group(
    text: str,
    *later: str,
    task: Task = CLEAR,
    scores: Mapping[str, float] | None = None,
    second: Mapping[str, float] | None = None,
    tokens: int = 10,
) -> Group:
    scores = {"interactivity": 0.5} if scores is None else scores
    future = Future(
        0,
        RolloutStatus.TERMINATED,
        (),
        scores,
        0.5,
        second_scores=second or {},
        policy_tokens=tokens,
        turns=tuple(map(policy_turn, later)),
    )
    copy = replace(future, index=1, copied=True)
    return Group(task, (1,), (Reply(policy_turn(text), (future, copy), 0.5),), kept=True)


def figures(*groups: Group, weight: float = 1.0) -> dict[str, float]:
    return values(hacking_metrics(groups, {"interactivity": weight}))


def test_questions_count_where_the_opening_is_complete() -> None:
    vague = replace(TASK, metadata={"ambiguous": True})
    unknown = replace(TASK, metadata={})
    asked = [group("which?", task=task) for task in (CLEAR, vague, unknown, FOLLOW_UP)]
    assert figures(*asked, group("done"))["hacking/needless_questions"] == 0.5
    assert "hacking/needless_questions" not in figures(*asked[1:])  # nothing was measured


def test_without_metadata_the_second_judge_says_what_is_complete() -> None:
    unknown = replace(TASK, metadata={})
    complete, lacking = ({"interactivity": 0.5, "opening_complete": value} for value in (1.0, 0.0))
    asked = [group("which?", task=unknown, second=second) for second in (complete, lacking, None)]
    found = figures(*asked, group("done", task=unknown, second=complete))
    assert found["hacking/needless_questions"] == 0.5
    assert [name for name in found if "opening" in name] == []


def test_clamped_share_and_lengths() -> None:
    found = figures(group("a", scores={"interactivity": 0.9}, tokens=30), group("b", tokens=10), weight=1.5)
    assert found["hacking/clamped_share"] == 0.5
    assert found["hacking/conversation_tokens_mean"] == 20.0
    wide = hacking_metrics([group("a", scores={"interactivity": 0.9})], {"interactivity": 1.5}, {"interactivity": 2.0})
    assert values(wide)["hacking/clamped_share"] == 0.0


def test_phrases_are_runs_of_four_words() -> None:
    assert list(phrases_of("I hope this helps you!")) == [
        ("i", "hope", "this", "helps"),
        ("hope", "this", "helps", "you"),
    ]
    assert list(phrases_of("three words only")) == []


def test_a_phrase_that_a_conversation_repeats() -> None:
    formula = "I hope this helps"
    assert figures(group(formula, formula))["hacking/repeated_phrases"] == 0.5
    assert figures(group("one two three four", "five six seven eight"))["hacking/repeated_phrases"] == 0.0
    assert "hacking/repeated_phrases" not in figures(group("too short"))


def test_a_phrase_that_most_prompts_get() -> None:
    same = [group(f"{text} Let me know if anything is unclear") for text in ("Done.", "Booked.", "Sent.")]
    assert figures(*same, group("a b c d e"))["hacking/common_phrase_share"] == 0.75
    quoting = replace(CLEAR, prompt=(Message("user", "say let me know if anything is unclear please"),))
    quoted = [replace(each, task=quoting) for each in same]
    assert figures(*quoted, group("a b c d e"))["hacking/common_phrase_share"] == 0.25  # "done let me know"
    assert "hacking/common_phrase_share" not in figures(same[0])  # one prompt shares with nobody
    parts = [hacking_metrics(part, {"interactivity": 1.0}) for part in (same, [group("x"), group("y")])]
    assert values(merged(parts))["hacking/common_phrase_share"] == 1.0  # of two driver processes the larger one


def test_agreement_and_generosity_of_the_judges() -> None:
    near = group("a", scores={"interactivity": 0.75}, second={"interactivity": 0.5})
    far = group("b", scores={"interactivity": 1.0}, second={"interactivity": 0.25})
    found = figures(near, far, group("c"))
    assert found["hacking/interactivity_agreement"] == 0.5
    assert found["hacking/interactivity_generosity"] == pytest.approx(0.5)
    assert not [name for name in figures(group("c")) if "agreement" in name]


@dataclass
class Marks:
    """A metric `interactivity` with one score for all, or without any."""

    mark: float | None
    name: str = "interactivity"
    seen: list[ScoredConversation] = field(default_factory=list)

    async def score(self, conversation: ScoredConversation) -> Score:
        self.seen.append(conversation)
        if self.mark is None:
            raise SimulatorError("the judge is down")
        return Score(self.mark, {"marked": self.mark})


def scorer(mark: float | None) -> Scorer:
    return Scorer([Marks(mark)], {"interactivity": 1.0})


async def played(second: float | None, share: float, first: float | None = 1.0) -> Reply:
    def ends(chat: Sequence[Message], sample_index: int) -> str:
        return "[TERMINATE]"

    cast_of: Players = replace(
        players(ScriptedEngine(["ok"]), ScriptedUser(ends)),
        scorer=cast(Any, scorer(first)),
        second_judge=SecondJudge(scorer(second), share),
    )
    return await play_once(TASK, TreeId(0, 0), limits=LIMITS, players=cast_of)


async def test_the_second_judge_scores_its_sample_and_rewards_nothing() -> None:
    reply = await played(0.25, share=1.0)
    assert reply.mr == 1.0
    assert reply.futures_K[0].second_scores == {"interactivity": 0.25}
    recorded = reply_record(reply)["futures"][0]
    assert recorded["second_scores"] == {"interactivity": 0.25}
    assert recorded["details"] == {"interactivity": {"marked": 1.0}}  # of the first judge alone
    assert (await played(0.25, share=0.0)).futures_K[0].second_scores == {}


async def test_a_second_judge_that_fails_costs_the_conversation_nothing() -> None:
    reply = await played(None, share=1.0)
    assert (reply.mr, reply.futures_K[0].second_scores) == (1.0, {})
    lost = await played(0.25, share=1.0, first=None)
    assert lost.futures_K[0].status is RolloutStatus.JUDGE_FAILED


@dataclass
class Verdicts:
    """Implements types.ChatLLM with one text for all."""

    text: str
    asked: list[LLMRequest[Any]] = field(default_factory=list)

    async def complete(self, request: LLMRequest[Any]) -> list[Any]:
        self.asked.append(request)
        try:
            return [request.parse(self.text)]
        except ValueError as error:
            raise SimulatorError(str(error)) from None


@pytest.mark.parametrize(
    ("task", "text", "scores"),
    [
        (replace(TASK, metadata={}), '{"complete": true}', {"interactivity": 0.5, "opening_complete": 1.0}),
        (replace(TASK, metadata={}), '{"complete": false}', {"interactivity": 0.5, "opening_complete": 0.0}),
        (replace(TASK, metadata={}), '{"complete": "who knows"}', {}),
        (TASK, "never asked", {"interactivity": 0.5}),
        (replace(FOLLOW_UP, metadata={}), "never asked", {"interactivity": 0.5}),
    ],
)
async def test_openings_are_judged_where_the_dataset_does_not_tell(
    task: Task, text: str, scores: dict[str, float]
) -> None:
    llm = Verdicts(text)
    conversation = ScoredConversation(task, (*task.prompt, Message("assistant", "which?")), len(task.prompt), 3)
    assert await SecondJudge(scorer(0.5), 1.0, llm).score(conversation) == scores
    assert len(llm.asked) == (text != "never asked")
    if llm.asked:
        assert task.single_turn_prompt in llm.asked[0].messages[0].content
        assert "which?" not in llm.asked[0].messages[0].content


def test_the_sample_has_its_share_and_is_always_the_same() -> None:
    judge = SecondJudge(scorer(1.0), 0.25)
    wanted = [judge.wants(index) for index in range(4000)]
    assert sum(wanted) / len(wanted) == pytest.approx(0.25, abs=0.02)
    assert [SecondJudge(scorer(1.0), 0.25).wants(index) for index in range(4000)] == wanted


def test_the_second_judge_scores_opinions_with_the_first_ones_settings(tmp_path: Path) -> None:
    rubric = tmp_path / "tone.txt"
    rubric.write_text("Is it kind?")
    reward = RewardSection(
        metric_weights={"judge": 1.0, "pass_rate": 1.0, "accuracy": 1.0},
        settings={"judge": {"rubric_file": str(rubric)}, "pass_rate": {}},
        second_judge=JudgeSection(model="other", api_key_env=None),
    )
    judge = JudgeSection(model="j", api_key_env=None)
    extractor = {"extractor": judge}
    simulators = SimulatorsSection(user=UserSection(model="u", api_key_env=None), judge=judge, roles=extractor)
    gateway = Gateway(llm_roles(simulators, reward), 1)
    second = configured_second_judge(reward, simulators, gateway)
    assert second is not None
    assert sorted(metric.name for metric in second._scorer.metrics) == ["accuracy", "judge"]
    assert second_judge_calls(reward, simulators, 20) == 3
    assert {role: role_place(role) for role in llm_roles(simulators, reward)} == {
        "user": "simulators.user",
        "judge": "simulators.judge",
        "second_judge": "reward.second_judge",
        "extractor": "simulators.roles.extractor",
    }


def test_the_second_judge_is_a_role_with_calls_that_are_planned_and_reserved() -> None:
    assert llm_roles(SIMULATORS, REWARD)["second_judge"].model == "other"
    assert "reward.second_judge" in llms_of_conversations(SIMULATORS, REWARD)
    assert second_judge_calls(REWARD, SIMULATORS, 10) == 3 * 3  # accuracy, interactivity, opening
    assert second_judge_calls(RewardSection(), SIMULATORS, 10) == 0
    assert RolloutSection().tree_futures == 24
    assert len(future_calls(SIMULATORS, REWARD, Lengths(), turns=1, reply=1)) == 2


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (RewardSection(metric_weights={"token_amount": -0.1}, second_judge=JudgeSection(model="o")), "no scores"),
        (RewardSection(second_judge=JudgeSection.model_validate({"model": "o", "prompt_file": "p"})), "prompt_file"),
    ],
)
def test_a_second_judge_without_work_or_with_a_prompt_is_refused(reward: RewardSection, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_metrics(reward, SIMULATORS)
