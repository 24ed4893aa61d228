"""turn_count: number of turns from the trained reply on."""

from __future__ import annotations

from typing import Literal

from collab_megatron.config.sections import Section
from collab_megatron.types import ScoredConversation


class TurnCountSettings(Section):
    """reward.settings.turn_count"""

    counts: Literal["assistant", "user", "both"] = "assistant"  # whose turns


class TurnCount:
    """Implements types.Metric without an LLM."""

    name = "turn_count"

    def __init__(self, settings: TurnCountSettings) -> None:
        counted = settings.counts
        self._roles = ("assistant", "user") if counted == "both" else (counted,)

    def score(self, conversation: ScoredConversation) -> float:
        """Turns; never fails."""
        future = conversation.messages[conversation.num_prompt_messages :]
        return float(sum(message.role in self._roles for message in future))
