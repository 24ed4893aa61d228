"""The engines as the step loop sees them: they give batches, take weights, and may be lost on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from collab_megatron.config import RLConfig
from collab_megatron.engine.keys import EngineKeys
from collab_megatron.errors import NoEngineLeft
from collab_megatron.launch.cli import TrainerArguments
from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.actor.grid import RankGrid
from collab_megatron.trainer.engine_probe import write_engine_probe
from collab_megatron.trainer.interrupt import Interrupt
from collab_megatron.trainer.recorded_batches import RecordedBatches
from collab_megatron.trainer.rollout_client import RolloutClient
from collab_megatron.trainer.sync.proof.probe import probe_ids
from collab_megatron.trainer.sync.publisher import Publisher, SyncReport
from collab_megatron.types import RolloutBatch
from collab_megatron.wire.roster import EngineEntry

T = TypeVar("T")


class BatchSource(Protocol):
    """Where a trainer rank's batches come from: engines, or a record. Methods are collective over all ranks."""

    @property
    def live(self) -> tuple[EngineEntry, ...]:
        """Servers in use. For rank 0."""
        ...

    def publish(self, version: int) -> SyncReport | None:
        """Give the weights after `version` steps to the servers that sample; None: there are none."""
        ...

    def next_batch(self, step: int, saved: int) -> RolloutBatch: ...
    def evaluate(self, step: int) -> dict[str, float]: ...
    def make_room(self) -> None: ...
    def write_probe(self) -> None: ...
    def close(self) -> None: ...


def open_source(
    config: RLConfig,
    arguments: TrainerArguments,
    actor: Actor,
    grid: RankGrid,
    interrupt: Interrupt,
    engine_keys: EngineKeys | None,
    *,
    first_step: int,
) -> BatchSource:
    """The engines and drivers that the launcher has started, or the record of config.replay. Collective."""
    if config.replay is not None:
        return RecordedBatches(grid, config, first_step)
    rollouts = RolloutClient(
        grid,
        driver_addresses=arguments.driver_addresses(config.driver.shards, config.engine.startup_timeout_s),
        driver_token=arguments.driver_token(),
        step_timeout_s=config.driver.step_timeout_s,
        eval_timeout_s=config.evaluation.timeout_s,
        interrupt=interrupt,
    )
    publisher = Publisher(
        actor,
        roster=arguments.roster_folder(),
        engine=config.engine,
        sync=config.sync,
        probe_ids=probe_ids(config.model.path),
        weights_dir=config.run.weights_dir,
        engine_keys=engine_keys,
    )
    return Engines(config, publisher, rollouts)


class Engines:
    """Weight publisher and rollout client of one trainer rank. Every method is collective over all ranks.

    Each raises NoEngineLeft on every rank if no engine comes back within `engine.wait_s`.
    """

    def __init__(self, config: RLConfig, publisher: Publisher, rollouts: RolloutClient) -> None:
        self._config, self._publisher, self._rollouts = config, publisher, rollouts

    @property
    def live(self) -> tuple[EngineEntry, ...]:
        return self._publisher.servers.live

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

    def write_probe(self) -> None:
        """Write what an engine answers under the newest weights. On rank 0 alone."""
        write_engine_probe(self._config, self._publisher.control)

    def close(self) -> None:
        """Ask the drivers to end."""
        self._rollouts.close()
        self._publisher.close()

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
