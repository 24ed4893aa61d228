"""When a trainer's state is saved: by steps, by the clock, and before whatever ends the run.

    saving = Saving(checkpoints, grid, config.run, config.train, Interrupt())
    with saving.before_any_end():
        while saving.done < total:
            with saving.step():
                ...  # changes weights and optimizer
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

from collab_megatron.actor.grid import RankGrid, meet
from collab_megatron.checkpoint.folders import step_folder
from collab_megatron.config.sections import RunSection, TrainSection
from collab_megatron.errors import Interrupted

MEET_S = 60.0
"""Ranks that end for the same reason come together within this time to save; where one does not, nothing is saved."""

logger = logging.getLogger(__name__)


class Saves(Protocol):
    """checkpoint.run.Checkpoints, or a stand-in."""

    saved: int  # steps that the newest complete checkpoint of this run holds

    def save(self, step: int, *, best_loss: float | None = None) -> None: ...

    def wait(self) -> None: ...


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
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """After a resume: the newest checkpoint's steps are done."""
        self._checkpoints, self._grid, self._run, self._train = checkpoints, grid, run, train
        self._interrupt, self._clock = interrupt, clock
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
        """Whether to save after this step. Collective. Raises Interrupted on every rank where rank 0 is to end."""
        every_s = self._train.save_every_s
        # by rank 0's clock and signals: others' come at other times, and a save takes all ranks
        by_clock = every_s > 0 and self._clock() - self._last_save >= every_s
        told = torch.tensor([by_clock, self._interrupt.asked])
        if self._grid.world_size > 1:
            dist.broadcast(told, src=0, group=self._grid.cpu_group)
        time_is_up, interrupted = told.tolist()
        if interrupted:
            raise Interrupted("interrupted")
        done, interval = self.done, self._train.save_interval
        return bool(done == self._train.steps or (interval and done % interval == 0) or time_is_up)

    def save(self, *, best_loss: float | None = None) -> None:
        """Collective; best_loss as for Checkpoints.save. Raises RunError on every rank where this save, or the one
        before it, failed."""
        self._begun = self.done  # where this fails, the end of the run does not try once more
        self._checkpoints.save(self.done, best_loss=best_loss)
        self._last_save = self._clock()

    @contextlib.contextmanager
    def before_any_end(self) -> Iterator[None]:
        """Save what the failure of the block would lose, then let it go on its way."""
        try:
            yield
        except Exception:
            self._rescue()
            raise

    def _rescue(self) -> None:
        """Never raises: what ended the run is the news. Where this rank alone has failed, the others are still waiting
        elsewhere, and a save would hang."""
        try:
            if self._whole and self.done > self._begun:
                meet(self._grid, "the last save", min(MEET_S, self._grid.timeout_s))
                self.save()
            self._checkpoints.wait()
        except Exception as failure:  # noqa: BLE001  (the caller raises what came first)
            logger.warning("the state after step %d could not be saved: %s", self.done, failure)
        if self._grid.is_main:
            print(self.newest(), flush=True)

    def newest(self) -> str:
        """What is on the disk and how to go on, for the user."""
        saved = self._checkpoints.saved
        if not saved:
            return "no checkpoint of this run is complete: it begins again at step 0"
        lost = "" if saved >= self.done else f", {self.done - saved} behind what was trained"
        go_on = "; run.resume=true goes on" if saved < self._train.steps else ""  # a resume needs a step to take
        return f"step {saved} is saved{lost}: {step_folder(self._run.checkpoints_dir, saved)}{go_on}"
