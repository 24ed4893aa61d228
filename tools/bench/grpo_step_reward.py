"""A reward without an LLM, the same for both sides of tools/bench/grpo_step.py. Needs neither package."""

from __future__ import annotations

import zlib
from typing import Any


def reward_of(text: str) -> float:
    """0 to 1, as good as random: every group has spread, so that no side may leave one out."""
    return zlib.crc32(text.encode(errors="surrogatepass")) % 1000 / 1000


class Checksum:
    """The reward as a metric of collab_megatron."""

    name = "checksum"

    async def score(self, conversation: Any) -> float:
        """Of the reply that is trained."""
        return reward_of(str(conversation.last_assistant))


def register() -> None:
    from collab_megatron.rollout.rewards.registry import register_metric

    register_metric("checksum")(lambda _context: Checksum())
