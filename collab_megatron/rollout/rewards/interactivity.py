"""interactivity: how well the assistant works together with the user, by an LLM judge.

The mean of three marks in [0, 1]: understanding, clarification, helpful suggestion. The judge sees the hidden request
too, or only the chat, like the paper's ITR judge (arXiv 2502.00640).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from collab_megatron.rollout.llm.parsing import json_object, object_schema, share_field
from collab_megatron.rollout.llm.templates import chat_lines, load_template
from collab_megatron.types import ChatLLM, LLMRequest, Message, ScoredConversation

MARKS = ("understanding", "clarification", "suggestion")
Sees = Literal["request", "chat"]
PROMPTS: Mapping[Sees, tuple[str, tuple[str, ...]]] = {  # the shipped prompt, and its optional names next to $chat
    "request": ("judge_interactivity", ("request",)),
    "chat": ("judge_interactivity_chat", ()),
}
MARKS_SCHEMA = object_schema(thought="string", **dict.fromkeys(MARKS, "number"))


class Interactivity:
    """Implements types.Metric with an LLM judge. Raises UserError if the prompt file cannot be used."""

    name = "interactivity"

    def __init__(self, judge: ChatLLM, prompt_file: Path | None = None, *, sees: Sees = "request") -> None:
        """A prompt file may leave out $request; with sees="chat" it must."""
        self._judge = judge
        name, optional = PROMPTS[sees]
        self._template = load_template(name, prompt_file, required=("chat",), optional=optional)

    async def score(self, conversation: ScoredConversation) -> float:
        """The mean mark in [0, 1]. Waits for one judge call. Raises SimulatorError."""
        prompt = self._template.fill(
            request=conversation.task.single_turn_prompt, chat=chat_lines(conversation.messages)
        )
        request = LLMRequest(
            [Message("user", prompt)],
            parse=read_marks,
            sample_index=conversation.sample_index,
            json_reply=True,
            schema=MARKS_SCHEMA,
        )
        (mark,) = await self._judge.complete(request)
        return mark


def read_marks(text: str) -> float:
    """The mean of the judge's marks. Raises MalformedReply if one is missing or out of range."""
    reply = json_object(text)
    return sum(share_field(reply, name) for name in MARKS) / len(MARKS)
