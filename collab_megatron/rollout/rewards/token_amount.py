"""token_amount: length of the conversation for the reader, from the trained reply on.

The default unit is the paper's: thousands of assistant tokens, as the engine sampled them; user turns do not count. The
verl recipe counts words, divided by white space, of both sides: its weight of -0.0001 belongs to `unit: words`.
"""

from __future__ import annotations

from typing import Literal

from collab_megatron.config.sections import Section
from collab_megatron.types import ScoredConversation

PER_KILO = 1000


class TokenAmountSettings(Section):
    """reward.settings.token_amount"""

    # tokens and kilotokens: of the policy's turns; words: of both sides, as the verl recipe counts
    unit: Literal["tokens", "kilotokens", "words"] = "kilotokens"


class TokenAmount:
    """Implements types.Metric without an LLM."""

    name = "token_amount"

    def __init__(self, settings: TokenAmountSettings | None = None) -> None:
        self._unit = (settings or TokenAmountSettings()).unit

    async def score(self, conversation: ScoredConversation) -> float:
        """Tokens, thousands of tokens, or words; never fails."""
        if self._unit == "words":
            future = conversation.messages[conversation.num_prompt_messages :]
            return float(sum(len(message.content.split()) for message in future))
        return conversation.policy_tokens / (PER_KILO if self._unit == "kilotokens" else 1)
