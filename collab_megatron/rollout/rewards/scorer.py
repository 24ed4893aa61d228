"""The scorer: runs all metrics of a conversation at the same time.

A score must be a finite number. Anything else (NaN, None, text) is a judge failure with the metric's name; clamping
would turn it into a reward, since `max(-1, min(1, nan))` is 1.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from numbers import Real

from collab_megatron.concurrency import run_all
from collab_megatron.rollout.llm import SimulatorError
from collab_megatron.rollout.llm.accounting import METRIC
from collab_megatron.rollout.rewards.aggregate import conversation_reward
from collab_megatron.types import Metric, ScoredConversation

SHORT_CHARS = 60  # of a wrong value in an error message
OURS = f"{__name__.partition('.')[0]}."
"""Prefix of this package's modules; a metric from elsewhere is the user's own."""
OWN_METRIC = "_own_metric"
"""Attribute of an exception: whether a metric of the user's own raised it."""


class Scorer:
    """The metrics of a run and their weights. Raises ValueError if they are not for the same metrics."""

    def __init__(self, metrics: Sequence[Metric], weights: Mapping[str, float]) -> None:
        names = [metric.name for metric in metrics]
        if sorted(names) != sorted(weights):
            raise ValueError(f"metrics {sorted(names)} and weights {sorted(weights)} must name the same metrics")
        self.metrics = tuple(metrics)
        self.weights = dict(weights)

    async def score(self, conversation: ScoredConversation) -> dict[str, float]:
        """Metric name -> raw score. Waits for the slowest metric; if one fails, the others are cancelled.

        Raises SimulatorError if a judge gave no usable reply or a metric no finite number: a conversation is scored by
        all metrics or not at all.
        """
        scores = await run_all(_score(metric, conversation) for metric in self.metrics)
        return {metric.name: score for metric, score in zip(self.metrics, scores, strict=True)}

    def reward(self, scores: Mapping[str, float]) -> float:
        """R* of these scores."""
        return conversation_reward(scores, self.weights)


async def _score(metric: Metric, conversation: ScoredConversation) -> float:
    """The score of one metric, whose `score` may be a plain function. Runs in its own task, since it sets METRIC."""
    METRIC.set(metric.name)
    try:
        value = metric.score(conversation)
        if inspect.isawaitable(value):
            value = await value
    except Exception as raised:
        error = _first_error(raised)
        error.add_note(f"in metric {metric.name}")
        setattr(error, OWN_METRIC, not type(metric).__module__.startswith(OURS))
        if error is not raised:
            raise error from None
        raise
    return finite_score(metric.name, value)


def is_of_own_metric(error: Exception) -> bool:
    """Whether it comes from a bug in a metric of the user's own, which ends the run (docs/rewards.md)."""
    return getattr(error, OWN_METRIC, False)


def finite_score(metric: str, value: object) -> float:
    """A score as a float. Raises SimulatorError if it is not a finite number."""
    if not isinstance(value, Real):
        raise SimulatorError(f"metric {metric} returned {_short(value)}, not a number: its `score` must return a float")
    number = float(value)
    if not math.isfinite(number):
        raise SimulatorError(
            f"metric {metric} returned {number}: return a finite number, or raise SimulatorError if there is no score"
        )
    return number


def _first_error(error: Exception) -> Exception:
    """The first exception of a group, however deep: a metric may use asyncio.TaskGroup, which wraps a failed call."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


def _short(value: object) -> str:
    text = repr(value)
    return f"a {type(value).__name__} ({text if len(text) <= SHORT_CHARS else text[:SHORT_CHARS] + '...'})"
