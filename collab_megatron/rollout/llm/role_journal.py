"""The journal as one role uses it: an answered request is not sent again, and an answer is stored before it is used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from collab_megatron.rollout.journal.store import Journal
from collab_megatron.rollout.llm.litellm_api import ApiRequest
from collab_megatron.types import LLMReply

KEY_BYTES = 16


class RoleJournal:
    """Answers by what was asked (request_key)."""

    def __init__(self, journal: Journal, role: str, model: str) -> None:
        self._journal = journal
        self._role = role
        self._model = model

    @property
    def may_ask(self) -> bool:
        """Whether a request that the journal cannot answer, or answers with a malformed reply, is sent."""
        return self._journal.replay != "only"

    def find(self, key: bytes) -> LLMReply | None:
        """The stored answer, now free of charge. Raises ReplayMiss if there is none and nothing may be sent."""
        found = self._journal.reply(key, what=f"an answer of {self._role} ({self._model})")
        return None if found is None else replace(found, cost_usd=0.0, replayed=True)

    def keep(self, key: bytes, reply: LLMReply) -> None:
        """Store an answer, and count it as paid."""
        self._journal.record_reply(key, self._role, reply)

    def keep_for_step(self, key: bytes, reply: LLMReply) -> None:
        """Keep an answer that was paid for as long as the rows of the current step."""
        self._journal.keep_reply(key, self._role, reply)


def request_key(model: str, request: ApiRequest) -> bytes:
    """The key of a request to `model`, which is the role's and not the deployment's: a replay may use another one."""
    asked, section = request.asked, request.section
    parameters = {
        "temperature": request.temperature,
        "max_tokens": section.max_tokens,
        "n": request.n,
        "seed": request.seed,
        "json": asked.json_reply,
        "schema": None if request.schema is None else dict(request.schema),
    }
    if section.extra:  # without any, the key is that of older journals
        parameters["extra"] = dict(section.extra)
    return reply_key(model, request.messages, parameters, asked.sample_index)


def reply_key(
    model: str, messages: Sequence[Mapping[str, str]], parameters: Mapping[str, Any], sample_index: int
) -> bytes:
    """The key of a request: a hash of its content.

    `parameters` are what shapes the reply (temperature, max_tokens, n, seed, response format), never an API key or a
    header. Raises TypeError or ValueError for values that JSON does not have, such as NaN.
    """
    content = [model, [dict(message) for message in messages], dict(parameters), sample_index]
    # ASCII: half a surrogate pair in a text has no UTF-8
    canonical = json.dumps(content, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode("ascii"), digest_size=KEY_BYTES).digest()
