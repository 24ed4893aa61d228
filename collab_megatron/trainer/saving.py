"""Checkpoint schedule of a trainer: by steps, by the clock, and before whatever ends the run.

    saving = Saving(checkpoints, grid, config.run, config.train, Interrupt(grace_s), record)
    with saving.before_any_end():
        while saving.done < total:
            with saving.step():
                ...  # changes weights and optimizer
            ...  # the step's figures are written: no checkpoint is newer than they are
            if saving.due():
                saving.save()

The state is consistent between two updates. A failure inside an update leaves a mixture of old and new weights, which
is never saved: the checkpoint before it stays the newest.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
import torch.distributed as dist

from collab_megatron.config.sections import RunSection, TrainSection
from collab_megatron.errors import Interrupted, RunError
from collab_megatron.trainer.actor.agreement import await_all_ranks
from collab_megatron.trainer.actor.grid import RankGrid
from collab_megatron.trainer.interrupt import Interrupt
from collab_megatron.wire.checkpoints import step_folder

LAST_SAVE_WAIT_S = 60.0
"""Ranks that end for the same reason meet within this time to save. If one does not come, nothing is saved."""

logger = logging.getLogger(__name__)


class Saves(Protocol):
    """checkpoint.manager.CheckpointManager, or a stand-in."""

    saved: int  # steps that the newest complete checkpoint of this run holds

    def save(self, step: int, *, best_loss: float | None = None) -> None: ...

    def wait(self) -> None: ...


def no_record() -> None:
    """The record of a rank that writes no figures."""


class Saving:
    """Build and use it on every rank alike."""

    def __init__(
        self,
        checkpoints: Saves,
        grid: RankGrid,
        run: RunSection,
        train: TrainSection,
        interrupt: Interrupt,
        record: Callable[[], None] = no_record,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create it after a resume: the steps of the newest checkpoint count as done.

        record: writes the figures of all done steps to the disk; called on rank 0 before every save.
        """
        self._checkpoints, self._grid, self._run, self._train = checkpoints, grid, run, train
        self._interrupt, self._record, self._clock = interrupt, record, clock
        self._last_save = clock()
        self._begun = checkpoints.saved  # steps in the newest save that was started
        self._whole = True
        self.done = checkpoints.saved  # steps that the weights hold

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """The block takes the weights and the optimizer from `done` steps to one more."""
        self._whole = False
        yield
        self._interrupt.install()
        self.done += 1
        self._whole = True

    def due(self) -> bool:
        """Whether to save after this step. Collective. Raises Interrupted on every rank if a signal came to any."""
        every_s = self._train.save_every_s
        # rank 0's clock decides for all
        by_clock = self._grid.is_main and every_s > 0 and self._clock() - self._last_save >= every_s
        time_is_up = self._any_rank(by_clock, self._interrupt.asked)
        return self._train.saves_after(self.done) or time_is_up

    def go_on(self) -> None:
        """Call it between two long pieces of work after the last step. Collective. Raises Interrupted as `due` does."""
        self._any_rank(False, self._interrupt.asked)

    def _any_rank(self, due: bool, interrupted: bool) -> bool:
        flags = torch.tensor([due, interrupted], dtype=torch.int32)
        if self._grid.world_size > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._grid.cpu_group)
        any_due, any_interrupted = flags.tolist()
        if any_interrupted:
            raise Interrupted("interrupted")
        return bool(any_due)

    def save(self, *, best_loss: float | None = None) -> None:
        """Collective; best_loss as for CheckpointManager.save. Raises RunError on every rank if this save, or the one
        before it, failed."""
        self._write_figures()
        self._checkpoints.wait()  # raises if the earlier save failed: then this state has not been tried yet
        self._begun = self.done  # if this save fails, the end of the run does not try again
        self._checkpoints.save(self.done, best_loss=best_loss)
        self._last_save = self._clock()

    @contextlib.contextmanager
    def before_any_end(self) -> Iterator[None]:
        """Save what the failure of the block would lose, then raise the failure."""
        try:
            yield
        except Exception:  # of any kind: raised again once the state is saved
            self._rescue()
            raise

    def _rescue(self) -> None:
        """Never raises: the user must see what ended the run. If this rank alone has failed, the others wait elsewhere
        and a save would hang; hence await_all_ranks."""
        try:
            if self._whole and self.done > self._begun:
                await_all_ranks(
                    self._grid, "the last save", min(LAST_SAVE_WAIT_S, self._train.save_grace_s, self._grid.timeout_s)
                )
                self._finish_earlier()
                self.save()
            self._checkpoints.wait()
        except Exception as failure:  # noqa: BLE001  (the caller raises the first failure)
            logger.warning("the state after step %d could not be saved: %s", self.done, failure)
        if self._grid.is_main:
            print(self.newest(), flush=True)

    def _finish_earlier(self) -> None:
        """Wait for an asynchronous save. If it failed, the state to save now has not been tried yet."""
        try:
            self._checkpoints.wait()
        except RunError as failure:
            logger.warning("the save after step %d failed: %s", self._begun, failure)

    def _write_figures(self) -> None:
        """Never raises: the other ranks have started the save and wait for this one."""
        try:
            if self._grid.is_main:
                self._record()
        except RunError as failure:
            logger.warning("the figures up to step %d may be lost: %s", self.done, failure)

    def newest(self) -> str:
        """Sentence for the user: what is saved and how to continue."""
        saved = self._checkpoints.saved
        if not saved:
            return "this run has no complete checkpoint: it starts again at step 0"
        lost = f" (training was at step {self.done})" if saved < self.done else ""
        then = "continues from it" if saved < self._train.steps else "finishes what comes after it"
        return f"step {saved} is saved{lost}: {step_folder(self._run.checkpoints_dir, saved)}; run.resume=true {then}"
