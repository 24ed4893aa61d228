"""From scores to rewards, and figures about replies. Pure.

R* of one conversation = sum over metrics of clamp(weight * score, -1, 1)
MR of a reply          = mean of R* over the scored futures
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from collab_megatron.types import Future

LIMIT = 1.0
QUESTION_MARKS = "?？؟"  # Latin, full-width, Arabic


def conversation_reward(scores: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """R* of one conversation.

    Raises KeyError if a weighted metric has no score (missing is not zero), ValueError if one is NaN.
    """
    return sum(_clamp(name, weight * scores[name]) for name, weight in weights.items())


def multiturn_reward(futures: Iterable[Future]) -> float | None:
    """MR: the mean reward of the scored futures; None if there are none."""
    rewards = [future.reward for future in _scored(futures) if future.reward is not None]
    return sum(rewards) / len(rewards) if rewards else None


def clamped_share(futures: Iterable[Future], weights: Mapping[str, float]) -> float:
    """Share of the scored futures in which the clamp cuts a metric; 0 without scored futures.

    If it is high, that metric no longer tells replies apart: lower its weight. A score that just reaches the limit is
    not cut.
    """
    cut = [
        any(abs(weight * future.scores[name]) > LIMIT for name, weight in weights.items())
        for future in _scored(futures)
        if future.scores
    ]
    return sum(cut) / len(cut) if cut else 0.0


def asks_question(text: str) -> bool:
    """Whether `text` contains a question mark; measured on tasks that need no question.

    Marks in code or URLs count too: this is a figure for the dashboard, not a reward.
    """
    return any(mark in text for mark in QUESTION_MARKS)


def _clamp(name: str, value: float) -> float:
    if math.isnan(value):
        raise ValueError(f"the score of metric {name} is NaN")  # min and max would make it 1
    return max(-LIMIT, min(LIMIT, value))


def _scored(futures: Iterable[Future]) -> Iterable[Future]:
    return (future for future in futures if future.status.scored)
