"""judge: a rubric of the user's own, marked by an LLM on any scale and scored in [0, 1].

    reward:
      metric_weights: {judge: 1.0}
      settings:
        judge: {rubric_file: conf/tone.txt, lowest: 1, highest: 10}

The rubric is plain text: what is marked, and what a high and a low mark mean. The score is
(mark - lowest) / (highest - lowest); the record has the mark itself.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

from collab_megatron.config.sections import Finite, Section
from collab_megatron.errors import UserError
from collab_megatron.rollout.llm.parsing import json_object, number_field, object_schema
from collab_megatron.rollout.llm.templates import chat_lines, load_template
from collab_megatron.types import ChatLLM, LLMRequest, Message, Score, ScoredConversation

SCHEMA = object_schema(thought="string", mark="number")
HIDDEN = "(not shown)"


class RubricSettings(Section):
    """reward.settings.judge"""

    rubric_file: Path  # text file with the rubric
    lowest: Finite = 0.0  # mark of the worst conversation
    highest: Finite = 1.0  # mark of the best one
    shows: tuple[Literal["request", "reference"], ...] = ()  # what the judge sees besides the chat


class RubricJudge:
    """Implements types.Metric with an LLM judge. Raises UserError for a rubric, scale or prompt that cannot be used."""

    name = "judge"

    def __init__(self, judge: ChatLLM, settings: RubricSettings, prompt_file: Path | None = None) -> None:
        self._judge, self._settings = judge, settings
        optional = ("lowest", "highest", "request", "reference")
        self._template = load_template("judge_rubric", prompt_file, required=("rubric", "chat"), optional=optional)
        if settings.lowest >= settings.highest:
            raise UserError(
                f"reward.settings.judge: lowest={settings.lowest:g} is not below highest={settings.highest:g}: correct "
                "the scale"
            )
        try:
            self._rubric = settings.rubric_file.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"reward.settings.judge.rubric_file={settings.rubric_file} cannot be read ({error}): name a text file "
                "in UTF-8"
            ) from None
        if not self._rubric:
            raise UserError(f"reward.settings.judge.rubric_file={settings.rubric_file} is empty: write the rubric")

    async def score(self, conversation: ScoredConversation) -> Score:
        """The mark, scaled to [0, 1]. Waits for one judge call. Raises SimulatorError."""
        settings, task = self._settings, conversation.task
        prompt = self._template.fill(
            rubric=self._rubric,
            lowest=f"{settings.lowest:g}",
            highest=f"{settings.highest:g}",
            request=task.single_turn_prompt if "request" in settings.shows else HIDDEN,
            reference=task.ground_truth if "reference" in settings.shows else HIDDEN,
            chat=chat_lines(conversation.messages),
        )
        request = LLMRequest(
            [Message("user", prompt)],
            parse=partial(read_mark, lowest=settings.lowest, highest=settings.highest),
            sample_index=conversation.sample_index,
            json_reply=True,
            schema=SCHEMA,
        )
        (mark,) = await self._judge.complete(request)
        return Score((mark - settings.lowest) / (settings.highest - settings.lowest), {"mark": mark})


def read_mark(text: str, *, lowest: float, highest: float) -> float:
    """The judge's mark on its scale. Raises MalformedReply if it is missing or out of range."""
    return number_field(json_object(text), "mark", lowest, highest)
