"""The engines as the step loop sees them: ask them for a batch, give them weights, survive the loss of some."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from collab_megatron.errors import NoEngineLeft
from collab_megatron.trainer.rollout_client import RolloutClient
from collab_megatron.trainer.sync.publisher import Publisher, SyncReport
from collab_megatron.types import RolloutBatch

T = TypeVar("T")


class Engines:
    """Publisher and inbox of one trainer rank; every method is collective over all ranks.

    All raise NoEngineLeft, on every rank, once no engine has come back within `engine.wait_s`.
    """

    def __init__(self, publisher: Publisher, inbox: RolloutClient) -> None:
        self._publisher, self._inbox = publisher, inbox

    def publish(self, version: int) -> SyncReport:
        return self._publisher.publish(version)

    def next_batch(self, step: int, saved: int) -> RolloutBatch:
        """The rollouts of `step` under the weights of as many steps; a checkpoint holds `saved` steps."""
        return self._asked(lambda: self._inbox.next_batch(step, step, self._publisher.live_urls, saved), step)

    def evaluate(self, step: int) -> dict[str, float]:
        """Held-out figures under the weights after `step` steps."""
        return self._asked(lambda: self._inbox.evaluate(step, step, self._publisher.live_urls), step)

    def make_room(self) -> None:
        self._publisher.make_room()

    def _asked(self, ask: Callable[[], T], version: int) -> T:
        """The driver's answer. When its last engine died on the way, it is asked again as soon as one has come back
        and has the weights; what the dead one had sampled is sampled again."""
        while True:
            try:
                answer = ask()
            except NoEngineLeft:
                self._publisher.forget(self._inbox.take_lost())
                self._publisher.publish(version)  # waits for an engine; raises if none comes
                continue
            self._publisher.forget(self._inbox.take_lost())
            return answer
