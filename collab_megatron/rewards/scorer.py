"""All metrics of one conversation, beside each other."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from collab_megatron.rewards.aggregate import conversation_reward
from collab_megatron.types import Metric, ScoredConversation


class Scorer:
    """The metrics of a run and their weights. Raises ValueError if the two do not name the same metrics."""

    def __init__(self, metrics: Sequence[Metric], weights: Mapping[str, float]) -> None:
        names = [metric.name for metric in metrics]
        if sorted(names) != sorted(weights):
            raise ValueError(f"metrics {sorted(names)} and weights {sorted(weights)} must name the same metrics")
        self.metrics = tuple(metrics)
        self.weights = dict(weights)

    async def score(self, conversation: ScoredConversation) -> dict[str, float]:
        """Metric name -> raw score. Waits for the slowest metric; if one fails the others are cancelled.

        Raises SimulatorError if a judge could not be had: a conversation is scored by all metrics or not at all.
        """
        try:
            async with asyncio.TaskGroup() as group:
                tasks = {m.name: group.create_task(m.score(conversation)) for m in self.metrics}
        except ExceptionGroup as errors:  # `except*` would wrap what is raised in a group again
            raise first_error(errors) from None
        return {name: task.result() for name, task in tasks.items()}

    def reward(self, scores: Mapping[str, float]) -> float:
        """R* of these scores."""
        return conversation_reward(scores, self.weights)


def first_error(errors: BaseException) -> BaseException:
    """The first plain exception of a group, however deep."""
    while isinstance(errors, BaseExceptionGroup):
        errors = errors.exceptions[0]
    return errors
