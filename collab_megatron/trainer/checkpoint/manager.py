"""The checkpoints of one run: resume from the newest, save at once or while training goes on.

checkpoints = CheckpointManager(actor, config.run, config.train, config=kept_config(config), rows_per_step=64)
first_step = checkpoints.resume()
...
checkpoints.save(done)
...
checkpoints.wait()
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from collab_megatron.config.sections import RunSection, TrainSection
from collab_megatron.errors import masked
from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.checkpoint.async_save import AsyncSave, grid_for_saves
from collab_megatron.trainer.checkpoint.save_load import Retention, begin_save, load_checkpoint, load_weights
from collab_megatron.wire.checkpoints import named_checkpoint, newest_complete
from collab_megatron.wire.provenance import data_position, differences


class CheckpointManager:
    """Every method is collective over all ranks, which must call them in the same order."""

    def __init__(
        self, actor: Actor, run: RunSection, train: TrainSection, *, config: Mapping[str, Any], rows_per_step: int
    ) -> None:
        """config: the run's, as JSON. rows_per_step: dataset rows per step."""
        self._actor, self._run, self._config, self._rows_per_step = actor, run, config, rows_per_step
        self._keep = Retention(train.keep_last, train.keep_every)
        self._save_grid = grid_for_saves(actor.grid) if train.async_save else None
        self._running: AsyncSave | None = None
        self.saved = 0  # steps that the newest complete checkpoint of this run holds
        self._saving = 0  # steps in the newest save that was started

    def resume(self) -> int:
        """Load the newest complete checkpoint and return its steps. Without one, or without run.resume, return 0, with
        the weights of run.init_from if it is set.

        Rank 0 prints a line for every difference from the run that saved it. Raises UserError if the checkpoint cannot
        be used: hostile files, another model or dtype.
        """
        folder = newest_complete(self._run.checkpoints_dir) if self._run.resume else None
        if folder is None:
            self._start_from(self._run.init_from)
            return 0
        info = load_checkpoint(self._actor, folder)
        if self._actor.grid.is_main:
            lines = differences(info.extra, self._config, info.versions, self._rows_per_step, info.step)
            how = "with these differences from the run that saved it:" if lines else "under the same config"
            print(masked("\n  ".join([f"resuming from {folder} {how}", *lines])), flush=True)
        self.saved = info.step
        return info.step

    def _start_from(self, path: Path | None) -> None:
        if path is None:
            return
        info = load_weights(self._actor, named_checkpoint(path).folder)
        if self._actor.grid.is_main:
            print(f"starting from the weights of {info.folder}, with a new optimizer", flush=True)

    def save(self, step: int, *, best_loss: float | None = None) -> None:
        """Save the state after `step` steps; with train.async_save only copy it, and write it while training goes on.

        best_loss: the held-out loss if it is the lowest so far; the checkpoint is kept until a lower one is saved.
        Raises RunError on every rank if this save failed, or the one before it that was still running.
        """
        self.wait()
        extra = {
            "config": self._config,
            "weight_version": step,
            "data": data_position(seed=self._run.seed, steps=step, rows_per_step=self._rows_per_step),
        }
        directory, save_grid = self._run.checkpoints_dir, self._save_grid
        keep = replace(self._keep, best_loss=best_loss)
        pending = begin_save(self._actor, directory, step=step, extra=extra, keep=keep, copy=save_grid is not None)
        self._saving = step
        if save_grid is None:
            pending.finish(self._actor.grid)
            self.saved = step
        else:
            self._running = AsyncSave(pending, save_grid)

    def wait(self) -> None:
        """Wait for a save that is still running. Raises RunError if it failed or missed the grid's deadline."""
        running, self._running = self._running, None
        if running is not None:
            running.wait()
            self.saved = self._saving
