"""A checkpoint written on a thread while training goes on (train.async_save).

The state is a copy on the host by then (store.begin). The thread's agreements go over a process group of its own, so
that they never meet those of the training. A process killed meanwhile leaves a folder that nobody takes for a
checkpoint.
"""

from __future__ import annotations

import atexit
import threading
from dataclasses import replace
from datetime import timedelta

import torch.distributed as dist

from collab_megatron.errors import RunError
from collab_megatron.trainer.actor.grid import RankGrid
from collab_megatron.trainer.checkpoint.save_load import PendingSave

_GRACE_S = 30.0  # for a save that still runs when the process ends with an error


def grid_for_saves(grid: RankGrid) -> RankGrid:
    """The same grid with another group for agreements. Collective."""
    return replace(grid, cpu_group=dist.new_group(backend="gloo", timeout=timedelta(seconds=grid.timeout_s)))


class AsyncSave:
    """One save on its thread. A daemon: a process that ends with an error waits for it, but not for long."""

    def __init__(self, pending: PendingSave, grid: RankGrid) -> None:
        """`grid` is that of grid_for_saves, and no other save uses it meanwhile."""
        self._pending, self._grid = pending, grid
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._write, name=f"checkpoint-{pending.step}", daemon=True)
        self._thread.start()
        atexit.register(self._thread.join, _GRACE_S)

    @property
    def is_running(self) -> bool:
        """On this rank."""
        return self._thread.is_alive()

    def wait(self) -> None:
        """Until it has ended, at most the grid's deadline. Raises RunError, as finish does, where it failed."""
        self._thread.join(self._grid.timeout_s)
        atexit.unregister(self._thread.join)
        if self.is_running:
            raise RunError(
                f"rank {self._grid.rank}: the checkpoint of step {self._pending.step} was not written within "
                f"{self._grid.timeout_s:g} s after training needed it; raise parallel.collective_timeout_s or "
                "train.save_interval"
            )
        if self._failure is not None:
            raise self._failure

    def _write(self) -> None:
        try:
            self._pending.finish(self._grid)
        except BaseException as error:  # noqa: BLE001  (raised again where the training waits)
            self._failure = error
