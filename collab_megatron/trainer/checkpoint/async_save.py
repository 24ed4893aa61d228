"""Asynchronous save: a thread writes the checkpoint while training goes on (train.async_save).

The thread writes a copy of the state on the host (save_load.begin_save). Its collectives have a process group of their
own, so that they never mix with those of training. A process killed meanwhile leaves a folder without a marker, which
is not taken for a checkpoint.
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

_GRACE_S = 30.0  # a process that ends with an error waits this long for a save that is still running


def grid_for_saves(grid: RankGrid) -> RankGrid:
    """The same grid with a CPU group of its own for saves. Collective."""
    return replace(grid, cpu_group=dist.new_group(backend="gloo", timeout=timedelta(seconds=grid.timeout_s)))


class AsyncSave:
    """One save on a daemon thread."""

    def __init__(self, pending: PendingSave, grid: RankGrid) -> None:
        """grid: from grid_for_saves; no other save may use it at the same time."""
        self._pending, self._grid = pending, grid
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._write, name=f"checkpoint-{pending.step}", daemon=True)
        self._thread.start()
        atexit.register(self._thread.join, _GRACE_S)

    @property
    def is_running(self) -> bool:
        """Whether this rank is still writing."""
        return self._thread.is_alive()

    def wait(self) -> None:
        """Wait for the save, at most the grid's deadline. Raises RunError if it failed or is late."""
        self._thread.join(self._grid.timeout_s)
        atexit.unregister(self._thread.join)
        if self.is_running:
            raise RunError(
                f"rank {self._grid.rank}: training waited {self._grid.timeout_s:g} s for the checkpoint of step "
                f"{self._pending.step}, which is still being written; raise parallel.collective_timeout_s or "
                "train.save_interval"
            )
        if self._failure is not None:
            raise self._failure

    def _write(self) -> None:
        try:
            self._pending.finish(self._grid)
        except BaseException as error:  # noqa: BLE001  (raised by wait)
            self._failure = error
