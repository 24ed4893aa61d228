"""The simulated user: an LLM that knows the whole task and plays the person who wants it done.

The chat reaches the LLM as JSON lines inside one prompt, not as chat turns of its own. In API turns the simulator would
have to be the "assistant" that speaks the user's lines, and models trained as assistants fall out of that part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from collab_megatron.config.sections import SimulatorsSection
from collab_megatron.rollout.llm.gateway import Gateway
from collab_megatron.rollout.llm.health import SimulatorHealth
from collab_megatron.rollout.llm.parsing import json_object, object_schema, text_field
from collab_megatron.rollout.llm.templates import chat_lines, load_template
from collab_megatron.types import TERMINATION_SIGNAL, ChatLLM, Message, Task

NO_DESCRIPTION = "Getting help from an assistant in a chat."
USER_TURN_SCHEMA = object_schema(thought="string", response="string")


class LLMUserSimulator:
    """Implements types.UserSimulator, for one simulator or a mixture behind one client."""

    def __init__(
        self,
        llm: ChatLLM,
        prompt_file: Path | None = None,
        *,
        templates: Sequence[Path | None] = (),
        part: Callable[[int], int] | None = None,
        health: SimulatorHealth | None = None,
        termination_signal: str = TERMINATION_SIGNAL,
    ) -> None:
        """`templates`: the prompt file of each part of a mixture, in place of `prompt_file`; `part` says which part
        answers for a sample index. Raises UserError if a prompt file cannot be used."""
        if len(templates) > 1 and part is None:
            raise ValueError("a mixture needs to know which part answers: pass `part`")
        self._llm = llm
        self._templates = [
            load_template("user", file, required=("request", "chat"), optional=("task_desc", "termination_signal"))
            for file in templates or (prompt_file,)
        ]
        self._part = part if len(templates) > 1 else None
        self._health = health
        self._signal = termination_signal

    async def reply(self, task: Task, chat: Sequence[Message], *, sample_index: int) -> str:
        """The next user turn (the opening, if `chat` has no turns); holds the termination signal if it ends it.

        Waits for one LLM call. Raises SimulatorError.
        """
        template = self._templates[0 if self._part is None else self._part(sample_index)]
        prompt = template.fill(
            task_desc=task.task_desc or NO_DESCRIPTION,
            request=task.single_turn_prompt,
            chat=chat_lines(chat),
            termination_signal=self._signal,
        )
        replies = await self._llm.complete(
            [Message("user", prompt)],
            sample_index=sample_index,
            json_reply=True,
            schema=USER_TURN_SCHEMA,
            check=read_user_turn,
        )
        text = read_user_turn(replies[0].text)
        if self._health is not None:
            self._health.observe_turn("user", task, chat, text, signal=self._signal)
        return text


def user_simulator(
    simulators: SimulatorsSection, gateway: Gateway, health: SimulatorHealth | None = None
) -> LLMUserSimulator:
    """The simulated user that a config describes. Raises UserError for a prompt file that cannot be used."""
    user = simulators.user
    return LLMUserSimulator(
        gateway.role("user"),
        templates=[section.prompt_file for section in (user, *user.mixture)],
        part=partial(gateway.part, "user"),
        health=health,
        termination_signal=user.termination_signal,
    )


def read_user_turn(text: str) -> str:
    """The `response` of a simulator's reply. Raises MalformedReply; the `thought` beside it never gets any further."""
    return text_field(json_object(text), "response")


def ends_chat(text: str, signal: str = TERMINATION_SIGNAL) -> bool:
    """Whether a user turn ends the conversation."""
    return signal in text


def strip_signal(text: str, signal: str = TERMINATION_SIGNAL) -> str:
    """The user turn without the termination signal; may be empty."""
    return text.replace(signal, "").strip()
