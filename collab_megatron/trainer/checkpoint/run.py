"""The checkpoints of one run: go on from the newest, save at once or beside the training.

checkpoints = Checkpoints(actor, config.run, config.train, config=config.model_dump(mode="json"), rows_per_step=64)
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
from collab_megatron.trainer.checkpoint.background import BackgroundSave, grid_beside
from collab_megatron.trainer.checkpoint.store import Keep, begin, load_checkpoint, load_weights
from collab_megatron.wire.checkpoints import named_checkpoint, newest_complete
from collab_megatron.wire.provenance import data_position, differences


class Checkpoints:
    """Every method is collective over all ranks, in the same order on each."""

    def __init__(
        self, actor: Actor, run: RunSection, train: TrainSection, *, config: Mapping[str, Any], rows_per_step: int
    ) -> None:
        """config: the run's, as JSON. rows_per_step: dataset rows that a step takes."""
        self._actor, self._run, self._config, self._rows_per_step = actor, run, config, rows_per_step
        self._keep = Keep(train.keep_last, train.keep_every)
        self._beside = grid_beside(actor.grid) if train.async_save else None
        self._running: BackgroundSave | None = None
        self.saved = 0  # steps that the newest complete checkpoint of this run holds
        self._saving = 0

    def resume(self) -> int:
        """Steps done: those of the newest complete checkpoint, now loaded; 0 where there is none or without run.resume:
        then the weights are those of run.init_from, where it is set.

        Rank 0 prints one line for every difference from the run that saved it. Raises UserError where it cannot be gone
        on from: hostile files, another model or dtype.
        """
        folder = newest_complete(self._run.checkpoints_dir) if self._run.resume else None
        if folder is None:
            self._start_from(self._run.init_from)
            return 0
        info = load_checkpoint(self._actor, folder)
        if self._actor.grid.is_main:
            lines = differences(info.extra, self._config, info.versions, self._rows_per_step, info.step)
            how = "with these differences from the run that saved it:" if lines else "under the same config"
            print(masked("\n  ".join([f"going on from {folder} {how}", *lines])), flush=True)
        self.saved = info.step
        return info.step

    def _start_from(self, path: Path | None) -> None:
        if path is None:
            return
        info = load_weights(self._actor, named_checkpoint(path).folder)
        if self._actor.grid.is_main:
            print(f"starting from the weights of {info.folder}, with a new optimizer", flush=True)

    def save(self, step: int, *, best_loss: float | None = None) -> None:
        """Save the state after `step` steps; with train.async_save only copy it, and write it beside the training.

        best_loss: the held-out loss where it is the lowest so far: the checkpoint stays until a lower one is saved.

        Raises RunError on every rank where this save, or the one before it that was still running, failed.
        """
        self.wait()
        extra = {
            "config": self._config,
            "weight_version": step,
            "data": data_position(seed=self._run.seed, steps=step, rows_per_step=self._rows_per_step),
        }
        directory, beside = self._run.checkpoints_dir, self._beside
        keep = replace(self._keep, best_loss=best_loss)
        pending = begin(self._actor, directory, step=step, extra=extra, keep=keep, copy=beside is not None)
        self._saving = step
        if beside is None:
            pending.finish(self._actor.grid)
            self.saved = step
        else:
            self._running = BackgroundSave(pending, beside)

    def wait(self) -> None:
        """Until nothing is being written. Raises RunError where that failed or took longer than the grid's deadline."""
        running, self._running = self._running, None
        if running is not None:
            running.wait()
            self.saved = self._saving
