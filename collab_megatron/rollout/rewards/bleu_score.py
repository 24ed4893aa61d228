"""bleu_score: sentence BLEU in [0, 1] of the conversation's final document against the reference.

An LLM extracts the document; sacrebleu computes its sentence BLEU (13a tokens, exponential smoothing, effective order),
which the paper's tables show times 100. A conversation without a document scores 0.
"""

from __future__ import annotations

import asyncio

from collab_megatron.rollout.rewards.extraction import Extractor
from collab_megatron.types import NoScore, Score, ScoredConversation


class BleuScore:
    """Implements types.Metric with an LLM that extracts."""

    name = "bleu_score"

    def __init__(self, extractor: Extractor) -> None:
        self._extractor = extractor

    async def score(self, conversation: ScoredConversation) -> Score | NoScore:
        """Waits for the extraction. Raises SimulatorError."""
        reference = conversation.task.ground_truth
        if not reference.strip():
            return NoScore("the task has no reference document")
        document = await self._extractor.extract(conversation)
        if not document.text:
            return Score(0.0, document.details)
        return Score(await asyncio.to_thread(sentence_bleu, document.text, reference), document.details)


def sentence_bleu(hypothesis: str, reference: str) -> float:
    """In [0, 1]."""
    import sacrebleu  # 0.3 s, and only this metric needs it

    return min(1.0, sacrebleu.sentence_bleu(hypothesis, [reference]).score / 100)  # a perfect one is 100.00000000000004
