"""Several models that play one role: which of them plays a conversation is drawn once, from the seed."""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from collab_megatron.types import ChatLLM, LLMReply, Message


def draw_part(weights: Sequence[float], seed: int, role: str, sample_index: int) -> int:
    """An index, with shares by weight. A pure function, so that a conversation keeps its simulator in every turn."""
    if len(weights) == 1:
        return 0
    digest = hashlib.blake2b(f"{seed}/{role}/{sample_index}".encode(), digest_size=8).digest()
    bounds = list(itertools.accumulate(weights))
    return min(bisect.bisect_right(bounds, int.from_bytes(digest, "big") / 2**64 * bounds[-1]), len(weights) - 1)


class Mixture:
    """Implements types.ChatLLM over several roles."""

    def __init__(self, parts: Sequence[ChatLLM], draw: Callable[[int], int]) -> None:
        self._parts = parts
        self._draw = draw

    async def complete(
        self,
        messages: Sequence[Message],
        *,
        sample_index: int = 0,
        n: int = 1,
        json_reply: bool = False,
        schema: Mapping[str, Any] | None = None,
        check: Callable[[str], object] | None = None,
    ) -> list[LLMReply]:
        """As the part that plays `sample_index` does it."""
        return await self._parts[self._draw(sample_index)].complete(
            messages, sample_index=sample_index, n=n, json_reply=json_reply, schema=schema, check=check
        )
