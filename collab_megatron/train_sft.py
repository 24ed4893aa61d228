"""Supervised fine-tuning on conversations; the loss is on assistant tokens only.

    python -m collab_megatron.train_sft conf/demo_sft.yaml [section.key=value ...] [--dry-run]

`main` launches the trainer ranks on this node; `train` runs in every rank. With data.validation the held-out loss is
computed every train.eval_interval steps, and the checkpoint with the lowest loss is kept (best.json in the run's
checkpoint folder names it). export_weights selects the weights for export_hf.
"""

from __future__ import annotations

import math
import time
from functools import partial
from typing import TYPE_CHECKING

from collab_megatron.config import SFTConfig, kept_config, load_config, show_config
from collab_megatron.errors import run_cli, run_rank
from collab_megatron.files import keep_from_others
from collab_megatron.launch.cli import parse_arguments
from collab_megatron.log import set_up_logging

if TYPE_CHECKING:
    from torch import Tensor


def train(config: SFTConfig) -> None:
    """The loop of one trainer rank."""
    # heavy imports that need megatron: the launcher, which shares this file, must start without them
    from collab_megatron.trainer.actor.actor import Actor
    from collab_megatron.trainer.actor.agreement import on_rank_zero
    from collab_megatron.trainer.actor.grid import close_grid, init_grid
    from collab_megatron.trainer.batching import MicroBatch
    from collab_megatron.trainer.checkpoint.manager import CheckpointManager
    from collab_megatron.trainer.checkpoint.save_load import load_checkpoint
    from collab_megatron.trainer.held_out_loss import HeldOutLoss, mean_loss
    from collab_megatron.trainer.interrupt import Interrupt
    from collab_megatron.trainer.loss.losses import LossSum, sft_loss
    from collab_megatron.trainer.report.timers import PhaseTimer
    from collab_megatron.trainer.saving import Saving, no_record
    from collab_megatron.trainer.sft_data import SFTData
    from collab_megatron.trainer.sft_reporter import SFTReporter
    from collab_megatron.trainer.skipped_steps import SkippedSteps
    from collab_megatron.wire.checkpoints import read_best, step_folder
    from collab_megatron.wire.completion import METRICS_FILE, export_label, exported_step, is_exported, is_measured

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
    data = SFTData(config, grid, actor.spec)
    checkpoints = CheckpointManager(
        actor, config.run, config.train, config=kept_config(config), rows_per_step=config.batch_size
    )
    first_step = checkpoints.resume()
    held = read_best(config.run.checkpoints_dir) if first_step else None
    lowest = held.loss if held else math.inf  # held-out loss after a training step
    reporter = SFTReporter(config, first_step=first_step, data=data) if grid.is_main else None
    timer = PhaseTimer()
    metrics = config.run.tensorboard_dir / METRICS_FILE

    def loss(logprobs: Tensor, batch: MicroBatch) -> LossSum:
        return sft_loss(logprobs, mask=batch.mask)

    def evaluate(done: int) -> bool:
        """Compute the held-out loss; whether it is the lowest so far. NaN is never the lowest."""
        nonlocal lowest
        begin = time.monotonic()
        found = HeldOutLoss(
            mean_loss(actor, data.held_out_batches(), data.held_out_tokens), data.held_out_tokens, data.num_held_out
        )
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
        with timer("data"):
            batch, trained_tokens = data.step(saving.done)
        with timer("update"), saving.step():
            result = actor.train_step(batch.micro_batches, loss, normalizer=trained_tokens)
        # before the checkpoint: a resume from it does not run this step again
        if reporter:
            reporter.step(saving.done, result, batch, trained_tokens, timer.drain())
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


def main() -> None:
    arguments = parse_arguments(__doc__)
    set_up_logging(arguments.who)
    config = load_config(SFTConfig, arguments.config, arguments.overrides)
    keep_from_others(config.run.umask)
    if arguments.trainer is not None:
        run_rank(partial(train, config))
    from collab_megatron.launch.end_report import report_at_end
    from collab_megatron.launch.epochs import epochs_to_steps
    from collab_megatron.launch.lock import run_lock
    from collab_megatron.launch.preflight import check_sft
    from collab_megatron.launch.run_processes import launch_sft

    config = epochs_to_steps(config)
    if arguments.dry_run:
        print(show_config(config), flush=True)
        check_sft(config, dry_run=True, node=arguments.node)
        return
    with run_lock(config.run, config.train.save_grace_s) as lock:  # before the checks: they look for checkpoints
        start = check_sft(config, node=arguments.node)
        with report_at_end(config.run, config.train.steps, None, exported=config.export_hf):
            if not start.is_done:
                launch_sft(config, lock)


if __name__ == "__main__":
    run_cli(main)
