"""The loop of one trainer rank in train_sft and train_dpo."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from collab_megatron.config import SupervisedConfig, kept_config
from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.actor.agreement import on_rank_zero
from collab_megatron.trainer.actor.grid import close_grid, init_grid
from collab_megatron.trainer.checkpoint.manager import CheckpointManager
from collab_megatron.trainer.checkpoint.save_load import load_checkpoint
from collab_megatron.trainer.interrupt import Interrupt
from collab_megatron.trainer.report.timers import PhaseTimer
from collab_megatron.trainer.saving import Saving, no_record
from collab_megatron.trainer.skipped_steps import SkippedSteps
from collab_megatron.trainer.step_profiler import StepProfiler
from collab_megatron.trainer.supervised.objective import Objective
from collab_megatron.trainer.supervised.reporter import SupervisedReporter
from collab_megatron.wire.checkpoints import read_best, step_folder
from collab_megatron.wire.completion import METRICS_FILE, export_label, exported_step, is_exported, is_measured

C = TypeVar("C", bound=SupervisedConfig)


def train_supervised(config: C, make_objective: Callable[[C, Actor], Objective], attempt: int) -> None:
    """Train, measure, save and export. make_objective is called before a checkpoint is loaded. attempt: number of this
    start of the run."""
    grid = init_grid(config.parallel, config.run.seed)
    total = config.train.steps
    actor = Actor.build(
        config.model.path,
        dtype=config.model.dtype,
        grid=grid,
        optimizer=config.optimizer,
        total_steps=total,
        recompute=config.train.recompute,
        logits_chunk_mb=config.train.logits_chunk_mb,
    )
    objective = make_objective(config, actor)
    data = objective.data
    checkpoints = CheckpointManager(
        actor, config.run, config.train, config=kept_config(config), rows_per_step=config.batch_size
    )
    first_step = checkpoints.resume()
    held = read_best(config.run.checkpoints_dir) if first_step else None
    lowest = held.loss if held else math.inf  # held-out loss after a training step
    reporter: SupervisedReporter | None = None
    if grid.is_main:
        reporter = SupervisedReporter(config, first_step=first_step, objective=objective, attempt=attempt)
    timer = PhaseTimer()
    profiler = StepProfiler(config.profile, config.run.profile_dir(attempt), grid)
    metrics = config.run.tensorboard_dir / METRICS_FILE

    def evaluate(done: int) -> bool:
        """Compute the held-out loss; whether it is the lowest so far. NaN is never the lowest."""
        nonlocal lowest
        begin = time.monotonic()
        found = objective.held_out()
        best = done > 0 and found.loss < lowest
        lowest = found.loss if best else lowest
        if reporter:
            reporter.evaluation(done, found, best=best, seconds=time.monotonic() - begin)
        return best

    def is_due(done: int) -> bool:
        """Whether to compute the held-out loss after `done` steps."""
        return data.num_held_out > 0 and config.train.evaluates_after(done)

    def is_best(done: int) -> bool:
        """Compute the held-out loss if it is due; whether to keep these weights as the best."""
        return is_due(done) and evaluate(done) and config.train.keep_best

    def was_missed(done: int) -> bool:
        """Whether an earlier attempt saved `done` steps and did not measure their held-out loss. Collective."""
        return done > 0 and not on_rank_zero(grid, partial(is_measured, metrics, done))

    def save(best_loss: float | None = None) -> None:
        with timer("checkpoint"):
            saving.save(best_loss=best_loss)
        if reporter:
            reporter.saved(saving.done, timer.drain())

    interrupt = Interrupt(config.train.save_grace_s)
    record = reporter.to_disk if reporter else no_record
    saving = Saving(checkpoints, grid, config.run, config.train, interrupt, record)
    skipped = SkippedSteps(config.train.max_skipped_steps)

    def train_step() -> None:
        with profiler.step(saving.done + 1):
            with timer("data"):
                batch = data.step(saving.done)
            micro_batches = objective.micro_batches(batch, timer)
            with timer("update"), saving.step():
                result = actor.train_step(micro_batches, objective.loss, normalizer=objective.normalizer(batch))
        # before the checkpoint: a resume from it does not run this step again
        if reporter:
            reporter.step(saving.done, result, batch, timer.drain())
        skipped.count([result])
        skipped.check(saving.done)

    def export() -> None:
        if config.export_hf is None:
            return
        exported = exported_step(config)
        if not on_rank_zero(grid, partial(is_exported, config)):  # an earlier attempt may have exported it
            if exported != total:
                load_checkpoint(actor, step_folder(config.run.checkpoints_dir, exported))
            actor.save_hf(config.export_hf, metadata=export_label(config, exported))
        if reporter:
            reporter.exported(exported, config.export_hf)

    with saving.before_any_end():
        if data.num_held_out and config.train.eval_at_start and first_step == 0:
            evaluate(0)
        if was_missed(first_step) and is_best(first_step):
            save(lowest)  # again, as the best
        while saving.done < total:
            train_step()
            keep = is_best(saving.done)
            if keep:  # before due(), which ends the run at a signal: its last save would not be named the best
                save(lowest)
            if saving.due() and not keep:
                save()
        saving.go_on()
    checkpoints.wait()
    export()
    if reporter:
        reporter.close()
    close_grid()
