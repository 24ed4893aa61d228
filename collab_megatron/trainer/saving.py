"""When a trainer's state is saved: by steps, by the clock, and before whatever ends the run.

    saving = Saving(checkpoints, grid, config.run, config.train, Interrupt(grace_s), record)
    with saving.before_any_end():
        while saving.done < total:
            with saving.step():
                ...  # changes weights and optimizer
            ...  # the step's figures are written: no checkpoint outlives them
            if saving.due():
                saving.save()

The state is whole between two updates. What fails inside an update leaves a mixture that no checkpoint may hold: the
newest one before it stays the newest.
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
from collab_megatron.trainer.actor.agreement import meet
from collab_megatron.trainer.actor.grid import RankGrid
from collab_megatron.wire.checkpoints import step_folder

MEET_S = 60.0
"""Ranks that end for the same reason come together within this time to save; where one does not, nothing is saved."""

logger = logging.getLogger(__name__)


class Saves(Protocol):
    """checkpoint.run.CheckpointManager, or a stand-in."""

    saved: int  # steps that the newest complete checkpoint of this run holds

    def save(self, step: int, *, best_loss: float | None = None) -> None: ...

    def wait(self) -> None: ...


def no_record() -> None:
    """Of a rank that writes no figures."""


class Asked(Protocol):
    """training.interrupt.Interrupt, or a stand-in."""

    asked: bool  # a signal has come

    def install(self) -> None: ...


class Saving:
    """Build and use it on every rank alike."""

    def __init__(
        self,
        checkpoints: Saves,
        grid: RankGrid,
        run: RunSection,
        train: TrainSection,
        interrupt: Asked,
        record: Callable[[], None] = no_record,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """After a resume: the newest checkpoint's steps are done.

        record: bring the figures of all steps that are done to the disk; called before every save, on rank 0.
        """
        self._checkpoints, self._grid, self._run, self._train = checkpoints, grid, run, train
        self._interrupt, self._record, self._clock = interrupt, record, clock
        self._last_save = clock()
        self._begun = checkpoints.saved  # steps in the newest save that was begun
        self._whole = True
        self.done = checkpoints.saved  # steps that the weights hold

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """The block takes the state from `done` steps to one more."""
        self._whole = False
        yield
        self._interrupt.install()
        self.done += 1
        self._whole = True

    def due(self) -> bool:
        """Whether to save after this step. Collective. Raises Interrupted on every rank where any is to end."""
        every_s = self._train.save_every_s
        # by rank 0's clock: a save takes all ranks
        by_clock = self._grid.is_main and every_s > 0 and self._clock() - self._last_save >= every_s
        time_is_up = self._any_rank(by_clock, self._interrupt.asked)
        done, interval = self.done, self._train.save_interval
        return bool(done == self._train.steps or (interval and done % interval == 0) or time_is_up)

    def go_on(self) -> None:
        """Between two long pieces of work after the last step. Collective. Raises Interrupted as `due` does."""
        self._any_rank(False, self._interrupt.asked)

    def _any_rank(self, question: bool, interrupted: bool) -> bool:
        told = torch.tensor([question, interrupted], dtype=torch.int32)
        if self._grid.world_size > 1:
            dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._grid.cpu_group)
        answer, ends = told.tolist()
        if ends:
            raise Interrupted("interrupted")
        return bool(answer)

    def save(self, *, best_loss: float | None = None) -> None:
        """Collective; best_loss as for CheckpointManager.save. Raises RunError on every rank where this save, or the
        one before it, failed."""
        self._write_figures()
        self._checkpoints.wait()  # where the save before this one failed, this state has not been tried yet
        self._begun = self.done  # where this fails, the end of the run does not try once more
        self._checkpoints.save(self.done, best_loss=best_loss)
        self._last_save = self._clock()

    @contextlib.contextmanager
    def before_any_end(self) -> Iterator[None]:
        """Save what the failure of the block would lose, then let it go on its way."""
        try:
            yield
        except Exception:  # of any kind: it goes on its way once the state is saved
            self._rescue()
            raise

    def _rescue(self) -> None:
        """Never raises: what ended the run is the news. Where this rank alone has failed, the others are still waiting
        elsewhere, and a save would hang."""
        try:
            if self._whole and self.done > self._begun:
                meet(self._grid, "the last save", min(MEET_S, self._train.save_grace_s, self._grid.timeout_s))
                self._finish_earlier()
                self.save()
            self._checkpoints.wait()
        except Exception as failure:  # noqa: BLE001  (the caller raises what came first)
            logger.warning("the state after step %d could not be saved: %s", self.done, failure)
        if self._grid.is_main:
            print(self.newest(), flush=True)

    def _finish_earlier(self) -> None:
        """Wait for a save that runs while training goes on; its failure is not that of the state to save now."""
        try:
            self._checkpoints.wait()
        except RunError as failure:
            logger.warning("the save after step %d failed: %s", self._begun, failure)

    def _write_figures(self) -> None:
        """Never raises: a save that other ranks have begun must not miss this one."""
        try:
            if self._grid.is_main:
                self._record()
        except RunError as failure:
            logger.warning("the figures up to step %d may be lost: %s", self.done, failure)

    def newest(self) -> str:
        """What is on the disk and how to go on, for the user."""
        saved = self._checkpoints.saved
        if not saved:
            return "no checkpoint of this run is complete: it begins again at step 0"
        lost = "" if saved >= self.done else f", {self.done - saved} behind what was trained"
        go_on = f"; run.resume=true {'goes on' if saved < self._train.steps else 'finishes what comes after it'}"
        return f"step {saved} is saved{lost}: {step_folder(self._run.checkpoints_dir, saved)}{go_on}"
