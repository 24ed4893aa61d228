"""The scorer: runs all metrics of a conversation at the same time.

A score must be a finite number. Anything else (NaN, None, text) is a judge failure with the metric's name; clamping
would turn it into a reward, since `max(-1, min(1, nan))` is 1.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from numbers import Real
from typing import Any

from collab_megatron.concurrency import run_all
from collab_megatron.rollout.llm import SimulatorError
from collab_megatron.rollout.llm.accounting import METRIC
from collab_megatron.rollout.rewards.aggregate import Clamps, conversation_reward
from collab_megatron.rollout.rewards.extraction import EXTRACTIONS, Extractions
from collab_megatron.types import Metric, NoScore, Score, ScoredConversation

DETAILS: ContextVar[dict[str, Mapping[str, Any]] | None] = ContextVar("DETAILS", default=None)
"""By metric: the details of the current conversation's scores, kept like its calls (llm/accounting.py)."""
SHORT_CHARS = 60  # of a wrong value in an error message
LONGEST_DETAIL_CHARS = 4_000  # of one text in the record
MOST_DETAILS = 64  # entries of one list or mapping in the record
OURS = f"{__name__.partition('.')[0]}."
"""Prefix of this package's modules; a metric from elsewhere is the user's own."""
OWN_METRIC = "_own_metric"
"""Attribute of an exception: whether a metric of the user's own raised it."""


class Scorer:
    """The metrics of a run, their weights and clamps. Raises ValueError if weights and metrics do not match."""

    def __init__(self, metrics: Sequence[Metric], weights: Mapping[str, float], clamps: Clamps | None = None) -> None:
        names = [metric.name for metric in metrics]
        if sorted(names) != sorted(weights):
            raise ValueError(f"metrics {sorted(names)} and weights {sorted(weights)} must name the same metrics")
        self.metrics = tuple(metrics)
        self.weights = dict(weights)
        self.clamps = dict(clamps or {})

    async def score(self, conversation: ScoredConversation) -> dict[str, float]:
        """Metric name -> raw score. Waits for the slowest metric; if one fails, the others are cancelled.

        Raises SimulatorError if a judge gave no usable reply or a metric no finite number: a conversation is scored by
        all metrics or not at all.
        """
        extractions = Extractions()
        before = EXTRACTIONS.set(extractions)
        try:
            scores = await run_all(_score(metric, conversation) for metric in self.metrics)
        finally:
            EXTRACTIONS.reset(before)
            await extractions.close()
        return {metric.name: score for metric, score in zip(self.metrics, scores, strict=True)}

    def reward(self, scores: Mapping[str, float]) -> float:
        """R* of these scores."""
        return conversation_reward(scores, self.weights, self.clamps)


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
    if isinstance(value, Score | NoScore):
        _keep_details(metric.name, value.details)
    if isinstance(value, NoScore):
        raise SimulatorError(f"metric {metric.name} has no score: {value.reason}")
    return finite_score(metric.name, value.value if isinstance(value, Score) else value)


def _keep_details(metric: str, details: Mapping[str, Any]) -> None:
    kept = DETAILS.get()
    if kept is not None and details:
        kept[metric] = _plain(details)


def _plain(value: Any) -> Any:
    """The value as JSON has it: long texts, lists and mappings cut, whatever else is no plain value as short text."""
    if isinstance(value, str):
        return value if len(value) <= LONGEST_DETAIL_CHARS else f"{value[:LONGEST_DETAIL_CHARS]}..."
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in list(value.items())[:MOST_DETAILS]}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value[:MOST_DETAILS]]
    return value if value is None or type(value) in (bool, int, float) else _short(value)


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
