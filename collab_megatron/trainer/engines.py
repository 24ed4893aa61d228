"""The engines as the step loop sees them: they give batches, take weights, and may be lost on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from collab_megatron.errors import NoEngineLeft
from collab_megatron.trainer.rollout_client import RolloutClient
from collab_megatron.trainer.sync.publisher import Publisher, SyncReport
from collab_megatron.types import RolloutBatch

T = TypeVar("T")


class Engines:
    """Weight publisher and rollout client of one trainer rank. Every method is collective over all ranks.

    Each raises NoEngineLeft on every rank if no engine comes back within `engine.wait_s`.
    """

    def __init__(self, publisher: Publisher, rollouts: RolloutClient) -> None:
        self._publisher, self._rollouts = publisher, rollouts

    def publish(self, version: int) -> SyncReport:
        return self._publisher.publish(version)

    def next_batch(self, step: int, saved: int) -> RolloutBatch:
        """The rollouts of `step`, sampled with the weights after `step` steps; `saved` steps are in a checkpoint."""
        return self._retried(lambda: self._rollouts.next_batch(step, step, self._publisher.live_urls, saved), step)

    def evaluate(self, step: int) -> dict[str, float]:
        """Held-out figures of the weights after `step` steps."""
        return self._retried(lambda: self._rollouts.evaluate(step, step, self._publisher.live_urls), step)

    def make_room(self) -> None:
        self._publisher.make_room()

    def _retried(self, ask: Callable[[], T], version: int) -> T:
        """The driver's answer. If its last engine died on the way, the driver is asked again once an engine is back and
        has the weights; what the dead engine had sampled is sampled again."""
        while True:
            try:
                answer = ask()
            except NoEngineLeft:
                self._publisher.forget(self._rollouts.take_lost())
                self._publisher.publish(version)  # waits for an engine; raises if none comes
                continue
            self._publisher.forget(self._rollouts.take_lost())
            return answer
