"""Recorded conversations as the step loop sees them, in the place of engines and driver (config section replay)."""

from __future__ import annotations

from collections.abc import Iterator

from collab_megatron.config import RLConfig
from collab_megatron.rollout.replay import open_replay
from collab_megatron.trainer.actor.agreement import on_rank_zero
from collab_megatron.trainer.actor.grid import RankGrid
from collab_megatron.trainer.sync.publisher import SyncReport
from collab_megatron.types import RolloutBatch
from collab_megatron.wire.roster import EngineEntry


class RecordedBatches:
    """As trainer.engines.Engines, without engines. Rank 0 reads the record."""

    def __init__(self, grid: RankGrid, config: RLConfig, first_step: int) -> None:
        self._grid, self._config, self._next = grid, config, first_step
        self._batches: Iterator[RolloutBatch] | None = None

    @property
    def live(self) -> tuple[EngineEntry, ...]:
        return ()

    def publish(self, version: int) -> SyncReport | None:
        """Nobody gets the weights."""
        return None

    def next_batch(self, step: int, saved: int) -> RolloutBatch:
        """The batch of `step` on every rank; steps are asked for in order. Collective. Raises UserError on every rank
        for a line that cannot be used."""
        assert step == self._next, "steps come in order"
        self._next += 1
        return on_rank_zero(self._grid, lambda: self._read(step))

    def _read(self, step: int) -> RolloutBatch:
        if self._batches is None:
            self._batches = open_replay(self._config).batches(step)
        return next(self._batches)

    def evaluate(self, step: int) -> dict[str, float]:
        raise AssertionError("a replay plays no held-out conversations (RLConfig.evaluates)")

    def make_room(self) -> None:
        """No engine has memory to give."""

    def write_probe(self) -> None:
        """There is no engine to probe."""

    def close(self) -> None:
        """Nothing is open but a file that is read."""
