"""Candidates that the assistant writes with the whole request and the reference answer in sight, as in CollabLLM's data
engine. The prompt asks it to collaborate and to give away neither; whether the reply helps is decided by its futures,
in which the assistant sees the chat alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from collab_megatron.rollout.llm.parsing import json_object, object_schema, text_field
from collab_megatron.rollout.llm.templates import chat_lines, load_template
from collab_megatron.types import LLMRequest, Message, Task

REPLY_SCHEMA = object_schema(thought="string", response="string")


class ProactivePrompt:
    """The prompt of these candidates. Raises UserError for a prompt file that cannot be used."""

    def __init__(self, prompt_file: Path | None = None) -> None:
        self._template = load_template(
            "assistant_proactive", prompt_file, required=("request", "reference", "chat"), optional=("task_desc",)
        )

    def request(self, task: Task, chat: Sequence[Message], *, sample_index: int, n: int) -> LLMRequest[str]:
        """Asks for `n` replies to `chat`."""
        prompt = self._template.fill(
            task_desc=task.task_desc or "-",
            request=task.single_turn_prompt,
            reference=task.ground_truth,
            chat=chat_lines(chat),
        )
        return LLMRequest(
            [Message("user", prompt)],
            parse=lambda text: text_field(json_object(text), "response"),
            sample_index=sample_index,
            n=n,
            json_reply=True,
            schema=REPLY_SCHEMA,
        )
