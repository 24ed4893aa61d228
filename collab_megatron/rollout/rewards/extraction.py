"""Extraction: the final document or code of a conversation, found by an LLM, once for all metrics that need it.

The scorer opens one `Extractions` per conversation. The first metric that asks for a kind starts the call; the others
wait for the same one. Outside of a scorer, as in a test of one metric, every request is a call of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from collab_megatron.concurrency import cancel_all
from collab_megatron.rollout.llm.accounting import METRIC
from collab_megatron.rollout.llm.parsing import json_object, object_schema, text_field, verdict_field
from collab_megatron.rollout.llm.templates import chat_lines, load_template
from collab_megatron.types import ChatLLM, LLMRequest, Message, ScoredConversation

Kind = Literal["document", "code"]
PROMPTS: Mapping[Kind, str] = {"document": "extract_document", "code": "extract_code"}
SCHEMA = object_schema(thought="string", found="boolean", text="string")


@dataclass(frozen=True)
class Extracted:
    """What an extraction found; an empty text: the assistant delivered nothing of this kind."""

    text: str
    verbatim: bool  # it stands in one assistant turn word for word, white space aside

    @property
    def details(self) -> dict[str, Any]:
        return {"found": bool(self.text), "verbatim": self.verbatim, "extracted": self.text}


class Extractions:
    """The extractions of one conversation."""

    def __init__(self) -> None:
        self._running: dict[Hashable, asyncio.Future[Extracted]] = {}

    async def once(self, key: Hashable, start: Callable[[], Awaitable[Extracted]]) -> Extracted:
        """The result of the first `start` for this key. Waits for it; raises what it raises."""
        if key not in self._running:
            self._running[key] = asyncio.ensure_future(start())
        return await asyncio.shield(self._running[key])  # a metric that is cancelled leaves the others their call

    async def close(self) -> None:
        """Waits until calls that nobody needs any longer have ended."""
        await cancel_all(self._running.values())


EXTRACTIONS: ContextVar[Extractions | None] = ContextVar("EXTRACTIONS", default=None)
"""Those of the conversation that is being scored."""


class Extractor:
    """Extracts one kind of result with one LLM. Raises UserError if the prompt file cannot be used."""

    def __init__(self, llm: ChatLLM, kind: Kind, prompt_file: Path | None = None) -> None:
        self._llm, self._kind, self._prompt_file = llm, kind, prompt_file
        self._template = load_template(PROMPTS[kind], prompt_file, required=("chat",), optional=("request",))

    async def extract(self, conversation: ScoredConversation) -> Extracted:
        """Waits for at most one call of the conversation. Raises SimulatorError."""
        shared = EXTRACTIONS.get()
        if shared is None:
            return await self._ask(conversation)
        key = (self._kind, id(self._llm), self._prompt_file)
        return await shared.once(key, lambda: self._ask(conversation))

    async def _ask(self, conversation: ScoredConversation) -> Extracted:
        METRIC.set("extraction")
        prompt = self._template.fill(
            request=conversation.task.single_turn_prompt, chat=chat_lines(conversation.messages)
        )
        request = LLMRequest(
            [Message("user", prompt)],
            parse=read_extraction,
            sample_index=conversation.sample_index,
            json_reply=True,
            schema=SCHEMA,
        )
        (text,) = await self._llm.complete(request)
        wanted = " ".join(text.split())
        turns = [" ".join(turn.content.split()) for turn in conversation.messages if turn.role == "assistant"]
        return Extracted(text, bool(wanted) and any(wanted in turn for turn in turns))


def read_extraction(text: str) -> str:
    """The text that was found; empty if there is none. Raises MalformedReply."""
    reply = json_object(text)
    return text_field(reply, "text") if verdict_field(reply, "found") else ""
