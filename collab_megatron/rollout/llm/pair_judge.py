"""Paired comparison: a judge says which of two conversations on the same task served the user better.

It is asked in both orders, because judges favor a position. The verdicts agree, or the pair is a tie. A judge that does
not answer leaves the pair out, which is counted and never a tie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from collab_megatron.concurrency import run_all
from collab_megatron.config.roles import PAIR_JUDGE
from collab_megatron.config.sections import ComparisonSection, SimulatorsSection
from collab_megatron.rollout.llm.gateway import Gateway
from collab_megatron.rollout.llm.parsing import MalformedReply, json_object, object_schema, text_field
from collab_megatron.rollout.llm.templates import chat_lines, load_template
from collab_megatron.types import ChatLLM, LLMRequest, Message, Task

Verdict = Literal["first", "second", "neither"]
VERDICTS: Mapping[str, Verdict] = {"first": "first", "second": "second", "neither": "neither"}
PAIR_SCHEMA = object_schema(thought="string", better="string")
CALLS_OF_PAIR = 2


class PairJudge:
    """Raises UserError for a prompt file that cannot be used."""

    def __init__(self, judge: ChatLLM, prompt_file: Path | None = None) -> None:
        self._judge = judge
        self._template = load_template(
            "judge_pair", prompt_file, required=("first", "second"), optional=("request", "reference")
        )

    async def points(
        self, task: Task, chat: Sequence[Message], other: Sequence[Message], *, sample_index: int
    ) -> float:
        """1 if `chat` is better than `other`, 0 if it is worse, 0.5 if neither is or the two orders disagree. Waits for
        two judge calls. Raises SimulatorError."""
        if list(chat) == list(other):
            return 0.5
        forth, back = await run_all(
            self._ask(task, first, second, sample_index) for first, second in ((chat, other), (other, chat))
        )
        points = {("first", "second"): 1.0, ("second", "first"): 0.0}
        return points.get((forth, back), 0.5)

    async def _ask(self, task: Task, first: Sequence[Message], second: Sequence[Message], sample_index: int) -> Verdict:
        prompt = self._template.fill(
            request=task.single_turn_prompt,
            reference=task.ground_truth,
            first=chat_lines(first),
            second=chat_lines(second),
        )
        request = LLMRequest(
            [Message("user", prompt)],
            parse=read_verdict,
            sample_index=sample_index,
            json_reply=True,
            schema=PAIR_SCHEMA,
        )
        (verdict,) = await self._judge.complete(request)
        return verdict


def pair_judge(simulators: SimulatorsSection, compare: ComparisonSection, gateway: Gateway) -> PairJudge:
    """The judge of a config: simulators.roles.pair_judge, else simulators.judge. Raises UserError."""
    return PairJudge(gateway.role(PAIR_JUDGE if PAIR_JUDGE in simulators.roles else "judge"), compare.prompt_file)


def read_verdict(text: str) -> Verdict:
    """The judge's verdict. Raises MalformedReply."""
    said = text_field(json_object(text), "better").strip().lower().rstrip(".")
    if said not in VERDICTS:
        raise MalformedReply(f"field 'better' is {said[:40]!r}, not first, second or neither")
    return VERDICTS[said]
