"""token_amount: length of the conversation for the reader, in thousands of assistant tokens from the trained reply on.

The unit is the paper's. Tokens are those that the engine sampled; user turns do not count.
"""

from __future__ import annotations

from collab_megatron.types import ScoredConversation


class TokenAmount:
    """Implements types.Metric without an LLM."""

    name = "token_amount"

    async def score(self, conversation: ScoredConversation) -> float:
        """Thousands of tokens; never fails."""
        return conversation.policy_tokens / 1000
