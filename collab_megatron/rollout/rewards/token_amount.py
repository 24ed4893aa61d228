"""token_amount: what the conversation cost the reader, in thousands of assistant tokens from the trained reply on.

The unit is the paper's. It is counted in policy tokens as the engine sampled them; user turns do not count.
"""

from __future__ import annotations

from collab_megatron.types import ScoredConversation


class TokenAmount:
    """Implements types.Metric without an LLM."""

    name = "token_amount"

    async def score(self, conversation: ScoredConversation) -> float:
        """Thousands of tokens; never fails."""
        return conversation.policy_tokens / 1000
