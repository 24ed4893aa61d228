"""Supervised fine-tuning on conversations; the loss is on assistant tokens only.

    python -m collab_megatron.train_sft conf/demo_sft.yaml [section.key=value ...] [--dry-run]

`main` launches the trainer ranks on this node; `train` is what every rank runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from collab_megatron.cluster.cli import parse_arguments
from collab_megatron.config import SFTConfig, dump_config, load_config
from collab_megatron.errors import run_cli

if TYPE_CHECKING:
    from torch import Tensor


def train(config: SFTConfig) -> None:
    """The loop of one trainer rank."""
    # heavy and megatron-bound: the launcher, which shares this file, must start without them
    from collab_megatron.actor.actor import Actor
    from collab_megatron.actor.grid import close_grid, init_grid
    from collab_megatron.algorithms.losses import LossSum, sft_loss
    from collab_megatron.batching import MicroBatch
    from collab_megatron.checkpoint.run import Checkpoints
    from collab_megatron.monitor.timers import PhaseTimer
    from collab_megatron.training.saving import Saving
    from collab_megatron.training.sft_data import SFTData
    from collab_megatron.training.sft_reporter import SFTReporter
    from collab_megatron.training.skipped import SkippedSteps

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
    checkpoints = Checkpoints(
        actor, config.run, config.train, config=config.model_dump(mode="json"), rows_per_step=config.batch_size
    )
    first_step = checkpoints.resume()
    reporter = SFTReporter(config, first_step=first_step, data=data) if grid.is_main else None
    timer = PhaseTimer()

    def loss(logprobs: Tensor, batch: MicroBatch) -> LossSum:
        return sft_loss(logprobs, mask=batch.mask)

    saving = Saving(checkpoints, grid, config.run, config.train)
    skipped = SkippedSteps(config.train.max_skipped_steps)
    with saving.before_any_end():
        while saving.done < total:
            with timer("data"):
                share, trained_tokens = data.step(saving.done)
            with timer("update"), saving.step():
                result = actor.train_step(share.micro_batches, loss, normalizer=trained_tokens)
            skipped.count([result])
            skipped.check(saving.done)
            if saving.due():
                with timer("checkpoint"):
                    saving.save()
            if reporter:
                reporter.step(saving.done, result, share, trained_tokens, timer.drain())
    checkpoints.wait()
    if config.export_hf is not None:
        metadata = {"run": str(config.run.dir), "name": config.run.name, "step": str(total)}
        actor.save_hf(config.export_hf, metadata=metadata)
    if reporter:
        reporter.close()
    close_grid()


def main() -> None:
    arguments = parse_arguments(__doc__)
    config = load_config(SFTConfig, arguments.config, arguments.overrides)
    if arguments.trainer is not None:
        train(config)
        return
    from collab_megatron.cluster.launch import launch_sft
    from collab_megatron.cluster.plan import sft_plan
    from collab_megatron.cluster.preflight import check_sft

    if arguments.dry_run:
        print(dump_config(config))
        print(sft_plan(config))
        return
    check_sft(config)
    launch_sft(config)


if __name__ == "__main__":
    run_cli(main)
