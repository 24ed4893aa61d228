"""Client of the rollout driver: rank 0 asks for batches and evaluations, the other ranks wait for its answer.

They wait on a gloo group of their own, whose deadline is above the driver's: simulating users takes longer than any
collective of training may.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from collab_megatron.trainer.actor.agreement import on_rank_zero
from collab_megatron.trainer.actor.grid import RankGrid
from collab_megatron.trainer.interrupt import Interrupt
from collab_megatron.types import RolloutBatch
from collab_megatron.wire.protocol import DriverClient, DriverHasNoEngine, DriverResult

MARGIN_S = 120.0
EVALUATION_GRACE_S = 30.0
"""The driver itself ends an evaluation at its deadline and delivers what it has."""

T = TypeVar("T")


class RolloutClient:
    """Build and use it on every rank alike."""

    def __init__(
        self,
        grid: RankGrid,
        *,
        driver_addresses: Sequence[str],
        driver_token: bytes,
        step_timeout_s: float,
        eval_timeout_s: float,
        interrupt: Interrupt | None = None,
    ) -> None:
        """driver_addresses: one per shard. driver_token: the run's secret, in every request. interrupt: ends a wait for
        the driver with Interrupted."""
        self._interrupt = interrupt
        self._grid = grid
        self._step_timeout_s = step_timeout_s
        self._eval_timeout_s = eval_timeout_s
        longest = timedelta(seconds=max(step_timeout_s, eval_timeout_s) + MARGIN_S)
        self._group = dist.new_group(backend="gloo", timeout=longest)
        self._driver = DriverClient(driver_addresses, driver_token) if grid.is_main else None
        self._lost: dict[str, str] = {}

    def next_batch(self, step: int, version: int, engines: Sequence[str], saved: int) -> RolloutBatch:
        """The batch of `step` on every rank, sampled by the servers at `engines`, which hold `version`.

        saved: steps in the newest complete checkpoint. Only rank 0's arguments matter. Raises on every rank:
        NoEngineLeft if the driver lost all engines (ask for the same step again); BudgetSpent, SimulatorSick or
        TooManyErrors if the run must stop; RunError if the driver could not deliver.
        """
        return self._on_rank_zero(
            lambda driver: driver.next_batch(step, version, engines, saved=saved, timeout_s=self._step_timeout_s)
        )

    def evaluate(self, step: int, version: int, engines: Sequence[str]) -> dict[str, float]:
        """Held-out figures on every rank. `engines` and errors as in `next_batch`."""
        timeout_s = self._eval_timeout_s + EVALUATION_GRACE_S
        return self._on_rank_zero(lambda driver: driver.evaluate(step, version, engines, timeout_s=timeout_s))

    def take_lost(self) -> dict[str, str]:
        """Servers that the driver gave up since the last call: URL -> reason. Empty on ranks other than 0."""
        lost, self._lost = self._lost, {}
        return lost

    def close(self) -> None:
        """Ask the driver to end."""
        if self._driver is not None:
            self._driver.stop()
            self._driver.close()

    def _on_rank_zero(self, ask: Callable[[DriverClient], DriverResult[T]]) -> T:
        """The content of rank 0's delivery, or its error, on every rank."""

        def act() -> T:
            assert self._driver is not None
            try:
                with self._interrupt.waiting() if self._interrupt else contextlib.nullcontext():
                    delivery = ask(self._driver)
            except DriverHasNoEngine as error:
                self._lost |= error.lost
                raise
            self._lost |= delivery.lost
            for note in delivery.notes:
                print(note, flush=True)
            return delivery.content

        return on_rank_zero(self._grid, act, group=self._group)
