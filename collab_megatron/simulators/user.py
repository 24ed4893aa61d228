"""The simulated user: an LLM that knows the whole task and plays the person who wants it done.

The chat reaches the LLM as JSON lines inside one prompt, not as chat turns of its own. In API turns the simulator would
have to be the "assistant" that speaks the user's lines, and models trained as assistants fall out of that part.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from collab_megatron.simulators.parsing import json_object, text_field
from collab_megatron.simulators.templates import chat_lines, load_template
from collab_megatron.types import TERMINATION_SIGNAL, ChatLLM, Message, Task

NO_DESCRIPTION = "Getting help from an assistant in a chat."


class LLMUserSimulator:
    """Implements types.UserSimulator. Raises UserError if the prompt file cannot be used."""

    def __init__(self, llm: ChatLLM, prompt_file: Path | None = None) -> None:
        self._llm = llm
        self._template = load_template(
            "user", prompt_file, required=("request", "chat"), optional=("task_desc", "termination_signal")
        )

    async def reply(self, task: Task, chat: Sequence[Message], *, sample_index: int) -> str:
        """The next user turn (the opening, if `chat` has no turns); holds TERMINATION_SIGNAL where the user ends it.

        Waits for one LLM call. Raises SimulatorError.
        """
        prompt = self._template.fill(
            task_desc=task.task_desc or NO_DESCRIPTION,
            request=task.single_turn_prompt,
            chat=chat_lines(chat),
            termination_signal=TERMINATION_SIGNAL,
        )
        replies = await self._llm.complete(
            [Message("user", prompt)], sample_index=sample_index, json_reply=True, check=read_user_turn
        )
        return read_user_turn(replies[0].text)


def read_user_turn(text: str) -> str:
    """The `response` of a simulator's reply. Raises MalformedReply; the `thought` beside it never gets any further."""
    return text_field(json_object(text), "response")


def ends_chat(text: str) -> bool:
    """Whether a user turn ends the conversation."""
    return TERMINATION_SIGNAL in text


def strip_signal(text: str) -> str:
    """The user turn without the termination signal; may be empty."""
    return text.replace(TERMINATION_SIGNAL, "").strip()
