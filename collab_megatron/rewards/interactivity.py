"""interactivity: how well the assistant works together with the user, by an LLM judge.

The mean of three marks in [0, 1]: understanding, clarification, helpful suggestion.
"""

from __future__ import annotations

from pathlib import Path

from collab_megatron.simulators.parsing import json_object, object_schema, share_field
from collab_megatron.simulators.templates import chat_lines, load_template
from collab_megatron.types import ChatLLM, Message, ScoredConversation

MARKS = ("understanding", "clarification", "suggestion")
MARKS_SCHEMA = object_schema(thought="string", **dict.fromkeys(MARKS, "number"))


class Interactivity:
    """Implements types.Metric with an LLM judge. Raises UserError if the prompt file cannot be used."""

    name = "interactivity"

    def __init__(self, judge: ChatLLM, prompt_file: Path | None = None) -> None:
        self._judge = judge
        self._template = load_template("judge_interactivity", prompt_file, required=("request", "chat"))

    async def score(self, conversation: ScoredConversation) -> float:
        """The mean mark in [0, 1]. Waits for one judge call. Raises SimulatorError."""
        prompt = self._template.fill(
            request=conversation.task.single_turn_prompt, chat=chat_lines(conversation.messages)
        )
        replies = await self._judge.complete(
            [Message("user", prompt)],
            sample_index=conversation.sample_index,
            json_reply=True,
            schema=MARKS_SCHEMA,
            check=read_marks,
        )
        return read_marks(replies[0].text)


def read_marks(text: str) -> float:
    """The mean of the judge's marks. Raises MalformedReply if one is missing or out of range."""
    reply = json_object(text)
    return sum(share_field(reply, name) for name in MARKS) / len(MARKS)
