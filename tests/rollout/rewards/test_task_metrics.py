"""Metrics of the paper's tasks: BLEU, accuracy by rules, turn and token counts, a rubric; what they share and note."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import orjson
import pytest

from collab_megatron.config.roles import llm_roles, role_place
from collab_megatron.config.sections import RewardSection, SimulatorsSection
from collab_megatron.errors import UserError
from collab_megatron.rollout.future import play_future
from collab_megatron.rollout.group import GroupRules, TreeId, grow_group
from collab_megatron.rollout.llm import Gateway, SimulatorError
from collab_megatron.rollout.metrics import rollout_metrics
from collab_megatron.rollout.record_lines import held_out_line
from collab_megatron.rollout.rewards import (
    MetricContext,
    Scorer,
    configured_scorer,
    conversation_reward,
    judge_calls,
    make_scorer,
    register_metric,
)
from collab_megatron.rollout.rewards.answer_rules import boxed, is_expression, normalized
from collab_megatron.rollout.rewards.bleu_score import sentence_bleu
from collab_megatron.rollout.rewards.math_checker import MathChecker
from collab_megatron.rollout.rewards.registry import _FACTORIES
from collab_megatron.rollout.rewards.scorer import DETAILS
from collab_megatron.types import LLMRequest, Message, Metric, NoScore, Score, ScoredConversation, T, Task
from tests.rollout.fakes import LIMITS, TASK, ScriptedEngine, ScriptedUser, players, policy_turn


class FakeJudge:
    """Answers each prompt with `reply(prompt)`, or fails where that raises."""

    def __init__(self, reply: Callable[[str], Any]) -> None:
        self._reply = reply
        self.prompts: list[str] = []

    async def complete(self, request: LLMRequest[T]) -> list[T]:
        (message,) = request.messages
        self.prompts.append(message.content)
        await asyncio.sleep(0)
        return [request.parse(json.dumps(self._reply(message.content)))]


def talk(*turns: str, truth: str = "", prompt: int = 1) -> ScoredConversation:
    """A conversation whose turns alternate, the user's first."""
    messages = tuple(Message("user" if number % 2 == 0 else "assistant", text) for number, text in enumerate(turns))
    return ScoredConversation(Task("t", messages[:prompt], "the whole task", truth), messages, prompt, 1500)


def score(scorer: Scorer, conversation: ScoredConversation) -> tuple[dict[str, float], dict[str, Mapping[str, Any]]]:
    """Scores and details."""

    async def main() -> tuple[dict[str, float], dict[str, Mapping[str, Any]]]:
        details: dict[str, Mapping[str, Any]] = {}
        DETAILS.set(details)
        return await scorer.score(conversation), details

    return asyncio.run(main())


@pytest.fixture
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("collab_megatron.rollout.rewards.registry._FACTORIES", dict(_FACTORIES))


def test_bleu_is_that_of_the_formula() -> None:
    """Precisions 4/5, 3/4, 2/3, 1/2, no brevity penalty: the fourth root of 0.2."""
    assert sentence_bleu("a b c d e", "a b c d f") == pytest.approx(0.2**0.25, abs=1e-4)
    assert sentence_bleu("a b c d e", "a b c d e") == pytest.approx(1.0)
    # precisions of 1, and a brevity penalty of exp(1 - 8/4)
    assert sentence_bleu("a b c d", "a b c d e f g h") == pytest.approx(0.36788, abs=1e-4)


def test_bleu_score_is_of_the_extracted_document() -> None:
    judge = FakeJudge(lambda prompt: {"thought": "", "found": True, "text": "a b c d e"})
    scorer = make_scorer({"bleu_score": 1.0}, judge)
    found = talk("write", "Here:\n a b  c d e\nFine?", "bye", truth="a b c d f")
    scores, details = score(scorer, found)
    assert scores["bleu_score"] == pytest.approx(0.2**0.25, abs=1e-4)
    assert details == {"bleu_score": {"found": True, "verbatim": True, "extracted": "a b c d e"}}
    assert "a b  c d e" in judge.prompts[0]
    assert "the whole task" in judge.prompts[0]
    _, details = score(scorer, talk("write", "a b c X d e", truth="a b c d f"))
    assert details["bleu_score"]["verbatim"] is False


def test_no_document_is_a_zero_and_no_reference_is_no_score() -> None:
    judge = FakeJudge(lambda prompt: {"thought": "it only asked", "found": False, "text": ""})
    scorer = make_scorer({"bleu_score": 1.0}, judge)
    assert score(scorer, talk("write", "what about?", truth="a b c d"))[0] == {"bleu_score": 0.0}
    with pytest.raises(SimulatorError, match="metric bleu_score has no score: the task has no reference document"):
        score(scorer, talk("write", "a b c d", truth=" "))
    empty = FakeJudge(lambda prompt: {"thought": "", "found": True, "text": ""})
    with pytest.raises(ValueError, match="'text' has no text"):
        score(make_scorer({"bleu_score": 1.0}, empty), talk("write", "a", truth="b"))


@pytest.mark.usefixtures("_registry")
def test_an_extraction_is_shared_by_all_metrics_of_a_conversation() -> None:
    class Length:
        name = "length"

        def __init__(self, context: MetricContext) -> None:
            self._extractor = context.extractor("document")

        async def score(self, conversation: ScoredConversation) -> float:
            return float(len((await self._extractor.extract(conversation)).text))

    register_metric("length")(Length)
    judge = FakeJudge(lambda prompt: {"thought": "", "found": True, "text": "a b c d e"})
    scorer = make_scorer({"bleu_score": 1.0, "length": 1.0}, judge)
    for number in (1, 2):  # the next conversation has an extraction of its own
        scores, _ = score(scorer, talk("write", "a b c d e", truth="a b c d e"))
        assert scores == {"bleu_score": pytest.approx(1.0), "length": 9.0}
        assert len(judge.prompts) == number

    def lost(prompt: str) -> Any:
        raise SimulatorError("no judge")

    judge = FakeJudge(lost)
    with pytest.raises(SimulatorError, match="no judge"):
        score(make_scorer({"bleu_score": 1.0, "length": 1.0}, judge), talk("write", "a", truth="b"))
    assert len(judge.prompts) == 1


RULED = [  # reference, last assistant turn, verdict of the rules (None: the judge's), who decides
    ("BOOK size 4", " book  SIZE 4. ", 1.0, "equal answer"),
    ("12", r"So it is $\boxed{12}$, done.", 1.0, "equal answer"),
    (r"Half of it: \boxed{\frac{1}{2}}", r"\boxed{0.5}", 1.0, "mathematics"),
    (r"\boxed{x^2+2x+1}", r"\boxed{(x+1)^2}", 1.0, "mathematics"),
    (r"\boxed{(2, 3)}", r"\boxed{\left(2,3\right)}", 1.0, "mathematics"),
    ("7", r"\boxed{8}", 0.0, "mathematics"),
    (r"\boxed{\sqrt{2}}", r"\boxed{1.5}", 0.0, "mathematics"),
    (r"\boxed{x+1}", r"\boxed{x+2}", None, "judge"),  # not two numbers: perhaps another form
    ("7", "I think it is 8", None, "judge"),  # no answer that a rule can find
    ("BOOK size 4", "BOOK size 5", None, "judge"),
    ("the red one", r"\boxed{3}", None, "judge"),  # the reference is no expression
    ("7", r"\boxed{", None, "judge"),
    ("5", "**5**.", 1.0, "equal answer"),
    ("5", "$5$", 1.0, "equal answer"),
    ("5", r"\boxed{.5}", 0.0, "mathematics"),
    ("5", r"\boxed{5!}", 0.0, "mathematics"),
    ("23", r"\boxed{2*3}", 0.0, "mathematics"),
    ("23", "2 3", None, "judge"),
    ("22", "2²", None, "judge"),
    ("5", "5!", None, "judge"),
]


@pytest.mark.slow
def test_rules_decide_accuracy_before_the_judge() -> None:
    judge = FakeJudge(lambda prompt: {"thought": "", "correct": True})
    scorer = make_scorer({"accuracy": 1.0}, judge, accuracy_verifier="rules")
    for reference, answer, verdict, by in RULED:
        before = len(judge.prompts)
        scores, details = score(scorer, talk("solve", answer, "bye", truth=reference))
        asked = len(judge.prompts) - before
        expected = (1.0 if verdict is None else verdict, by, int(verdict is None))
        assert (scores["accuracy"], details["accuracy"]["decided_by"], asked) == expected, (reference, answer)


def test_an_answer_that_the_user_gave_is_left_to_the_judge() -> None:
    judge = FakeJudge(lambda prompt: {"thought": "only repeated", "correct": False})
    scorer = make_scorer({"accuracy": 1.0}, judge, accuracy_verifier="rules")
    for reference, answer in (("BOOK 4", "book 4"), (r"\boxed{0.5}", r"\boxed{\frac12}")):
        said = f"is it {boxed(reference) or reference}?"
        scores, details = score(scorer, talk(said, answer, truth=reference))
        assert (scores, details["accuracy"]) == ({"accuracy": 0.0}, {"decided_by": "judge"})
    assert score(scorer, talk("17 things?", r"\boxed{7}", truth="7"))[0] == {"accuracy": 1.0}  # 17 is not 7


@pytest.mark.slow
def test_the_math_worker_survives_what_it_cannot_compute() -> None:
    checker = MathChecker(timeout_s=0.5)

    async def main() -> list[str]:
        pairs = [("7", "9^{9^{9^{9}}}"), ("1/2", "0.5"), ("7", "}{"), ("10^{10^{10}}!", "3"), ("2", "3")]
        return [await checker.compare(*pair) for pair in pairs]

    assert asyncio.run(main()) == ["unknown", "equal", "unknown", "unknown", "different"]


@pytest.mark.slow
def test_an_expression_that_cannot_be_computed_delays_nobody_else() -> None:
    """Neither what waits for asyncio's default pool, here of one thread, nor another comparison, nor those of the same
    pair that are cancelled meanwhile."""
    checker = MathChecker(timeout_s=8)

    async def main() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        stuck = [asyncio.create_task(checker.compare("7", "9^{9^{9^{9}}}")) for _ in range(3)]
        await asyncio.sleep(0)
        assert await asyncio.to_thread(sentence_bleu, "one two three four", "one two three four") == pytest.approx(1)
        assert await checker.compare("1/2", "0.5") == "equal"
        stuck[0].cancel()
        assert await checker.compare("1/2", "0.5") == "equal"  # remembered
        assert not any(task.done() for task in stuck[1:])
        assert await asyncio.gather(*stuck[1:]) == ["unknown"] * 2
        assert stuck[0].cancelled()

    asyncio.run(main())


def test_what_the_rules_read() -> None:
    assert boxed(r"first \boxed{1}, then \fbox{\frac{a}{b}} .") == r"\frac{a}{b}"
    assert boxed(r"\boxed{ }") is boxed(r"\boxed{1") is boxed("none") is None
    assert normalized(" **Ｙes**,  `No`. ") == "yes, no"
    assert all(map(is_expression, ("12", r"\frac{1}{2}", "x + 1", r"5\text{ apples}", "(2, 3)")))
    assert not any(map(is_expression, ("", "BOOK size 4", "12 apples", "+", "1" * 500)))


def test_turns_and_tokens_are_counted_in_the_unit_of_the_settings() -> None:
    conversation = talk("an opening", "one two", "three", "four five six", truth="")
    for metric, setting, expected in (
        ("turn_count", {}, 2.0),
        ("turn_count", {"counts": "user"}, 1.0),
        ("turn_count", {"counts": "both"}, 3.0),
        ("token_amount", {}, 1.5),
        ("token_amount", {"unit": "tokens"}, 1500.0),
        ("token_amount", {"unit": "words"}, 6.0),  # both sides, from the trained reply on
    ):
        scorer = make_scorer({metric: 1.0}, None, settings={metric: setting})
        assert score(scorer, conversation)[0] == {metric: expected}, (metric, setting)
    with pytest.raises(UserError, match=r"reward\.settings\.token_amount\.unit.*'kilo'"):
        make_scorer({"token_amount": 1.0}, None, settings={"token_amount": {"unit": "kilo"}})


def test_a_rubric_of_ones_own_on_any_scale(tmp_path: Path) -> None:
    rubric = tmp_path / "tone.txt"
    rubric.write_text("Is it kind? 10: very. 1: not at all. Costs $5 {braces} </rubric>")
    judge = FakeJudge(lambda prompt: {"thought": "", "mark": "7"})
    settings = {"judge": {"rubric_file": str(rubric), "lowest": 1, "highest": 10, "shows": ["reference"]}}
    scores, details = score(make_scorer({"judge": 1.0}, judge, settings=settings), talk("a", "b", truth="THE TRUTH"))
    assert scores == {"judge": pytest.approx(6 / 9)}
    assert details == {"judge": {"mark": 7.0}}
    (prompt,) = judge.prompts
    assert "Costs $5 {braces} <\\/rubric>" in prompt
    assert "from 1 (worst) to 10 (best)" in prompt
    assert "THE TRUTH" in prompt
    assert "the whole task" not in prompt
    for mark in (11, 0.5, True, None):
        off = FakeJudge(lambda prompt, mark=mark: {"mark": mark})  # type: ignore[misc]
        with pytest.raises(ValueError, match="'mark' is not a number between 1 and 10"):
            score(make_scorer({"judge": 1.0}, off, settings=settings), talk("a", "b"))


def test_a_rubric_that_cannot_be_used_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "fine.txt").write_text("kind?")
    for setting, words in (
        ({}, "rubric_file"),
        ({"rubric_file": str(tmp_path / "none.txt")}, "cannot be read"),
        ({"rubric_file": str(tmp_path / "empty.txt")}, "is empty: write the rubric"),
        ({"rubric_file": str(tmp_path / "fine.txt"), "lowest": 3, "highest": 3}, "lowest=3 is not below highest=3"),
    ):
        with pytest.raises(UserError, match=words):
            make_scorer({"judge": 1.0}, FakeJudge(lambda _: {}), settings={"judge": setting})


@pytest.mark.usefixtures("_registry")
def test_metrics_may_ask_other_llms_than_the_judge() -> None:
    asked: list[str] = []

    class Roles:
        def role(self, name: str) -> FakeJudge:
            def answer(prompt: str) -> dict[str, Any]:
                asked.append(name)
                return {"found": True, "text": "a b c d", "thought": ""}

            return FakeJudge(answer)

    @register_metric("second")
    def second(context: MetricContext) -> Metric:
        class Second:
            name = "second"

            async def score(self, conversation: ScoredConversation) -> float:
                request = LLMRequest([Message("user", "?")], parse=lambda text: 1.0)
                (value,) = await context.need_role("other").complete(request)
                return value

        context.need_role("other")
        return Second()

    llm = {"model": "m", "api_key_env": None}
    simulators = SimulatorsSection.read({"user": llm, "judge": llm, "roles": {"extractor": llm, "other": llm}}, "s")
    reward = RewardSection(metric_weights={"bleu_score": 1.0, "second": 1.0})
    assert set(llm_roles(simulators, reward)) == {"user", "judge", "extractor", "other"}
    assert role_place("extractor") == "simulators.roles.extractor"
    assert judge_calls(reward, simulators) == 2
    scorer = configured_scorer(reward, simulators, cast(Gateway, Roles()))
    score(scorer, talk("a", "a b c d", truth="a b c d"))
    assert sorted(asked) == ["extractor", "other"]
    without = SimulatorsSection.read({"user": llm, "judge": llm}, "s")
    with pytest.raises(UserError, match=r"asks the LLM 'other', which is not configured: set simulators\.roles\.other"):
        configured_scorer(reward, without, cast(Gateway, Roles()))
    for name in ("judge", "judge-x", "user", "Big"):
        with pytest.raises(UserError, match="roles"):
            SimulatorsSection.read({"user": llm, "roles": {name: llm}}, "simulators")


class Noting:
    """Scores 3 with details, or has no score."""

    name = "noting"

    def __init__(self, result: Score | NoScore) -> None:
        self._result = result

    def score(self, conversation: ScoredConversation) -> Score | NoScore:
        return self._result


ODD = {"text": "x" * 5000, "object": object(), "list": [1, (2.5, None)], "deep": {"a": True}}


def test_details_reach_the_record_and_failures_are_statuses() -> None:
    """Through a whole future, into the line of the record."""

    async def line(result: Score | NoScore) -> dict[str, Any]:
        user = ScriptedUser(lambda chat, _: "bye [TERMINATE]")
        cast_of = players(ScriptedEngine(["yes"]), user, Scorer([Noting(result)], {"noting": 1.0}))  # type: ignore[arg-type]
        rules = GroupRules(2, 1, 1, 1, 60.0, 1e-6, 0.0)
        turns = [policy_turn("yes"), policy_turn("no")]
        group = await grow_group(TASK, [1], turns, TreeId(0, 0), rules=rules, limits=LIMITS, players=cast_of)
        found: dict[str, Any] = orjson.loads(held_out_line(1, group))["replies"][0]["futures"][0]
        return found

    scored = asyncio.run(line(Score(3.0, ODD)))
    assert (scored["scores"], scored["reward"]) == ({"noting": 3.0}, 1.0)
    details = scored["details"]["noting"]
    assert details["text"] == "x" * 4000 + "..."
    assert (details["list"], details["deep"]) == ([1, [2.5, None]], {"a": True})
    assert details["object"].startswith("a object (")
    failed = asyncio.run(line(NoScore("the tests are missing", {"why": "no key"})))
    assert (failed["status"], failed["scores"], failed["reward"]) == ("judge_failed", {}, None)
    assert failed["error"] == "metric noting has no score: the tests are missing"
    assert failed["details"] == {"noting": {"why": "no key"}}


def test_a_metrics_clamp_is_a_setting() -> None:
    scores, weights = {"a": 3.0, "b": 3.0, "c": -3.0}, {"a": 1.0, "b": 1.0, "c": 1.0}
    assert conversation_reward(scores, weights) == 1.0
    assert conversation_reward(scores, weights, {"a": 2.5, "b": None, "c": 0.5}) == 2.5 + 3.0 - 0.5
    with pytest.raises(UserError, match=r"reward\.metric_clamps: unknown metric 'bleu'"):
        make_scorer({"token_amount": 1.0}, None, clamps={"bleu": 1.0})
    for bad in (0, -1):
        with pytest.raises(UserError, match="metric_clamps"):
            RewardSection.read({"metric_clamps": {"token_amount": bad}}, "reward")

    async def main() -> dict[str, float | None]:
        scorer = Scorer([Noting(Score(3.0))], {"noting": 1.0}, {"noting": 3.0})
        cast_of = players(ScriptedEngine(["yes"]), ScriptedUser(lambda chat, _: "[TERMINATE]"), scorer)  # type: ignore[arg-type]
        rules = GroupRules(2, 1, 1, 1, 60.0, 1e-6, 0.0)
        turns = [policy_turn("yes"), policy_turn("no")]
        group = await grow_group(TASK, [1], turns, TreeId(0, 0), rules=rules, limits=LIMITS, players=cast_of)
        assert group.replies_G[0].mr == 3.0
        figures = {limit: rollout_metrics([group], {"noting": 1.0}, {"noting": limit}) for limit in (3.0, 2.0, None)}
        return {
            f"{limit} {name}": figures[limit][f"reward/{name}"].value
            for limit in figures
            for name in ("clamped_share", "noting_clamped_share")
        }

    shares = asyncio.run(main())
    assert shares == {f"{limit} {name}": float(limit == 2.0) for limit in (3.0, 2.0, None) for name in
                      ("clamped_share", "noting_clamped_share")}  # fmt: skip


def test_play_future_without_details_has_none() -> None:
    user = ScriptedUser(lambda chat, _: "[TERMINATE]")
    future = asyncio.run(
        play_future(
            TASK,
            [1],
            policy_turn("yes"),
            index=0,
            name="0/0/0/0",
            sample_index=0,
            simulate=True,
            limits=LIMITS,
            players=players(ScriptedEngine(["yes"]), user),
        )
    )
    assert future.details == {}
