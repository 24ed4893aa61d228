"""What came back from a model: whether it can be used, and what the caller gets of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from collab_megatron.rollout.llm.litellm_api import ApiReply
from collab_megatron.text import has_half
from collab_megatron.types import LLMReply


class Observer(Protocol):
    """Told of every answer, the journal's too, for checks that go beyond one call."""

    def provider(self, role: str, model: str, fingerprint: str, deployment: int = 0) -> None:
        """What the provider says that it was."""

    def malformed(self, role: str, kind: str) -> None:
        """An answer that could not be used; `kind` is one of usage.MALFORMED."""


@dataclass(frozen=True)
class Answer:
    """What came back, from the provider or from the journal."""

    reply: ApiReply
    latency_s: float
    replayed: bool = False


def find_problem(reply: ApiReply, check: Callable[[str], object] | None) -> tuple[str, str] | None:
    """Why a reply cannot be used, as (one of usage.MALFORMED, words); None if it can."""
    if reply.problem:
        return reply.problem, f"the reply was {reply.problem.replace('_', ' ')}"
    if not reply.texts:
        return "empty", "no reply came"
    for text in reply.texts:
        if not text.strip():
            return "empty", "the reply is empty"
        if has_half(text):  # of a journal that an older version wrote; what comes now is made whole (litellm_api.py)
            return "unreadable", "half a surrogate pair in the reply"
        if check is not None:
            try:
                check(text)
            except (ValueError, RecursionError, OverflowError) as error:  # of `json.loads`, of `int`
                return "unreadable", str(error)
    return None


def share_out(answer: Answer) -> list[LLMReply]:
    """One LLMReply for each choice. The request's tokens and dollars stand on the first, so that sums stay right."""
    reply = answer.reply
    first = (reply.cost_usd, reply.prompt_tokens, reply.completion_tokens)
    return [
        LLMReply(
            text,
            *(first if index == 0 else (0.0, 0, 0)),
            latency_s=answer.latency_s,
            model=reply.model,
            fingerprint=reply.fingerprint,
            replayed=answer.replayed,
        )
        for index, text in enumerate(reply.texts)
    ]
