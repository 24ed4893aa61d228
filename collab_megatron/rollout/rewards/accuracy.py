"""accuracy: 1.0 if the conversation reached the reference answer, else 0.0.

`exact` compares the last assistant turn with the reference except for white space, for tasks whose answer has one form.
`judge` asks an LLM that sees task, reference and conversation.
`rules` asks that judge only where rules cannot tell: an equal answer (answer_rules.py) and mathematics that math-verify
finds equal are correct, a boxed number that is not the reference's is wrong.
"""

from __future__ import annotations

from pathlib import Path

from collab_megatron.rollout.llm.parsing import json_object, object_schema, verdict_field
from collab_megatron.rollout.llm.templates import chat_lines, load_template
from collab_megatron.rollout.rewards.answer_rules import equal_answer, expressions, said_by_user
from collab_megatron.rollout.rewards.math_checker import MathChecker
from collab_megatron.types import ChatLLM, LLMRequest, Message, Score, ScoredConversation

VERDICT_SCHEMA = object_schema(thought="string", correct="boolean")


class ExactAccuracy:
    """Implements types.Metric without an LLM."""

    name = "accuracy"

    async def score(self, conversation: ScoredConversation) -> float:
        """1.0 or 0.0; never fails."""
        return float(same_text(conversation.last_assistant, conversation.task.ground_truth))


class JudgedAccuracy:
    """Implements types.Metric with an LLM judge. Raises UserError if the prompt file cannot be used."""

    name = "accuracy"

    def __init__(self, judge: ChatLLM, prompt_file: Path | None = None) -> None:
        self._judge = judge
        self._template = load_template(
            "judge_accuracy", prompt_file, required=("reference", "chat"), optional=("request",)
        )

    async def score(self, conversation: ScoredConversation) -> float:
        """1.0 or 0.0. Waits for one judge call. Raises SimulatorError."""
        task = conversation.task
        prompt = self._template.fill(
            request=task.single_turn_prompt, reference=task.ground_truth, chat=chat_lines(conversation.messages)
        )
        request = LLMRequest(
            [Message("user", prompt)],
            parse=read_verdict,
            sample_index=conversation.sample_index,
            json_reply=True,
            schema=VERDICT_SCHEMA,
        )
        (verdict,) = await self._judge.complete(request)
        return float(verdict)


class RuledAccuracy:
    """Implements types.Metric with rules, and a judge where they cannot tell."""

    name = "accuracy"

    def __init__(self, judged: JudgedAccuracy, checker: MathChecker) -> None:
        self._judged, self._checker = judged, checker

    async def score(self, conversation: ScoredConversation) -> Score:
        """1.0 or 0.0, and who decided. Waits for the math worker, or one judge call. Raises SimulatorError."""
        verdict, rule = await self._by_rule(conversation)
        if verdict is None:
            return Score(await self._judged.score(conversation), {"decided_by": "judge"})
        return Score(float(verdict), {"decided_by": rule})

    async def _by_rule(self, conversation: ScoredConversation) -> tuple[bool | None, str]:
        """(verdict, rule); None where the rules cannot tell."""
        if equal_answer(conversation):
            return (None if said_by_user(conversation) else True), "equal answer"
        pair = expressions(conversation)
        found = "unknown" if pair is None else await self._checker.compare(*pair)
        if found == "different":
            return False, "mathematics"
        return (True if found == "equal" and not said_by_user(conversation) else None), "mathematics"


def same_text(left: str, right: str) -> bool:
    """Whether two texts are equal except for white space; an empty reference equals nothing."""
    return bool(right.split()) and left.split() == right.split()


def read_verdict(text: str) -> bool:
    """The judge's `correct`. Raises MalformedReply."""
    return verdict_field(json_object(text), "correct")
