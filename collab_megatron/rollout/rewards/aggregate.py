"""From scores to rewards, and figures about replies. Pure.

R* of one conversation = sum over metrics of clamp(weight * score, -limit, limit), limit 1 unless the config says
                         otherwise
MR of a reply          = mean of R* over the scored futures
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from collab_megatron.types import Future

LIMIT = 1.0
QUESTION_MARKS = "?？؟"  # Latin, full-width, Arabic


Clamps = Mapping[str, float | None]
"""Metric -> the limit of its weighted score; None: no limit. Metrics that are not named have LIMIT."""
DEFAULT_CLAMPS: Clamps = MappingProxyType({})


def conversation_reward(
    scores: Mapping[str, float], weights: Mapping[str, float], clamps: Clamps = DEFAULT_CLAMPS
) -> float:
    """R* of one conversation.

    Raises KeyError if a weighted metric has no score (missing is not zero), ValueError if one is NaN.
    """
    return sum(_clamp(name, weight * scores[name], clamps.get(name, LIMIT)) for name, weight in weights.items())


def multiturn_reward(futures: Iterable[Future]) -> float | None:
    """MR: the mean reward of the scored futures; None if there are none."""
    rewards = [future.reward for future in _scored(futures) if future.reward is not None]
    return sum(rewards) / len(rewards) if rewards else None


def clamped_shares(
    futures: Iterable[Future], weights: Mapping[str, float], clamps: Clamps = DEFAULT_CLAMPS
) -> dict[str, float]:
    """By metric: the share of the scored futures in which the clamp cuts it; "" is that of any metric. 0 without scored
    futures.

    If it is high, that metric no longer tells replies apart: lower its weight. A score that just reaches the limit is
    not cut.
    """
    limits = {name: clamps.get(name, LIMIT) for name in weights}
    cut = [
        {
            name
            for name, weight in weights.items()
            if (limit := limits[name]) is not None and abs(weight * future.scores[name]) > limit
        }
        for future in _scored(futures)
        if future.scores
    ]
    count = max(len(cut), 1)
    return {"": sum(map(bool, cut)) / count} | {name: sum(name in each for each in cut) / count for name in weights}


def asks_question(text: str) -> bool:
    """Whether `text` contains a question mark; measured on tasks that need no question.

    Marks in code or URLs count too: this is a figure for the dashboard, not a reward.
    """
    return any(mark in text for mark in QUESTION_MARKS)


def _clamp(name: str, value: float, limit: float | None) -> float:
    if math.isnan(value):
        raise ValueError(f"the score of metric {name} is NaN")  # min and max would make it 1
    return value if limit is None else max(-limit, min(limit, value))


def _scored(futures: Iterable[Future]) -> Iterable[Future]:
    return (future for future in futures if future.status.scored)
