"""Reinforcement learning with multiturn-aware rewards.

    python -m collab_megatron.train_rl conf/demo_rl.yaml [section.key=value ...] [--dry-run]

One step. The driver samples n replies per prompt from the engines, plays K futures of each against the simulated user,
has them judged, and turns the rewards into group advantages. The trainer scores the replies under the reference, takes
a clipped policy-gradient step, and publishes the new weights to the engines, with proof that they arrived. With
online_dpo the step is a DPO step on the best and the worst reply of each group. With replay.record=RUN_DIR the batches
come from recorded conversations, and nothing is sampled.

`main` launches engines, driver and trainer ranks on this node, or on all nodes of a job. `train` runs in every trainer
rank:

    driver --- wait_for_batch ---> update_policy ---> publish_weights ---> engines
                                        |                                     |
                        report_step, save_checkpoint               sample the next batch for the driver
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from collab_megatron.config import RLConfig, kept_config, load_config, show_config
from collab_megatron.errors import RunError, run_cli, run_rank
from collab_megatron.files import keep_from_others
from collab_megatron.launch.cli import TrainerArguments, parse_arguments
from collab_megatron.log import set_up_logging

if TYPE_CHECKING:
    from collab_megatron.trainer.rank_batch import LogprobModel
    from collab_megatron.trainer.sync.publisher import SyncReport
    from collab_megatron.types import RolloutBatch


def train(config: RLConfig, arguments: TrainerArguments) -> None:
    """The loop of one trainer rank."""
    # heavy imports that need megatron: the launcher, which shares this file, must start without them
    from collab_megatron.engine.keys import EngineKeys
    from collab_megatron.trainer.actor.actor import Actor
    from collab_megatron.trainer.actor.agreement import fail_together
    from collab_megatron.trainer.actor.grid import close_grid, init_grid
    from collab_megatron.trainer.actor.reference import build_reference
    from collab_megatron.trainer.checkpoint.manager import CheckpointManager
    from collab_megatron.trainer.engines import open_source
    from collab_megatron.trainer.evaluation_schedule import EvaluationSchedule
    from collab_megatron.trainer.interrupt import Interrupt
    from collab_megatron.trainer.online_dpo import update_on_pairs
    from collab_megatron.trainer.report.timers import PhaseTimer
    from collab_megatron.trainer.rl_reporter import RLReporter
    from collab_megatron.trainer.rl_step import update
    from collab_megatron.trainer.saving import Saving, no_record
    from collab_megatron.trainer.skipped_steps import SkippedSteps
    from collab_megatron.trainer.step_profiler import StepProfiler

    if config.engine.placement == "colocated" and config.parallel.device == "cuda":
        # before this rank uses its GPU: they divide the memory that is free at their start (launch/colocation.py)
        arguments.wait_for_engine(config.engine.startup_timeout_s)
    grid = init_grid(config.parallel, config.run.seed, waits_s=config.sync.timeout_s)
    total = config.train.steps
    actor = Actor.build(
        config.model.path,
        dtype=config.model.dtype,
        grid=grid,
        optimizer=config.optimizer,
        total_steps=total * config.algorithm.mini_batches,
        recompute=config.train.recompute,
        logits_chunk_mb=config.train.logits_chunk_mb,
        temperature=config.rollout.temperature,
        entropy_gradient=config.algorithm.entropy_coef > 0,
    )
    reference: LogprobModel | None = None
    if config.needs_reference:
        kind, chunk_mb = config.algorithm.reference, config.train.logits_chunk_mb
        reference = build_reference(actor, kind, logits_chunk_mb=chunk_mb)
    checkpoints = CheckpointManager(
        actor,
        config.run,
        config.train,
        config=kept_config(config),
        rows_per_step=config.rollout.prompts_per_step,
    )
    first_step = checkpoints.resume()

    arguments.wait_for_engine(config.engine.startup_timeout_s)
    interrupt = Interrupt(config.train.save_grace_s)
    engine_keys = EngineKeys.read(arguments.engine_keys) if arguments.engine_keys else None
    engines = open_source(config, arguments, actor, grid, interrupt, engine_keys, first_step=first_step)
    reporter = RLReporter(config, first_step=first_step, attempt=arguments.attempt) if grid.is_main else None
    timer = PhaseTimer()
    traces = config.run.profile_dir(arguments.attempt)
    profiler = StepProfiler(config.profile, traces, grid, lambda: engines.live, engine_keys)
    evaluations = EvaluationSchedule(engines, reporter, grid, config)
    record = reporter.to_disk if reporter else no_record
    saving = Saving(checkpoints, grid, config.run, config.train, interrupt, record)
    skipped = SkippedSteps(config.train.max_skipped_steps)

    def wait_for_batch() -> RolloutBatch:
        with timer("wait_for_rollout"):
            return engines.next_batch(saving.done, checkpoints.saved)

    def update_policy(batch: RolloutBatch) -> Mapping[str, float]:
        online = config.online_dpo
        with saving.step():
            if online is not None and reference is not None:
                metrics = update_on_pairs(
                    actor,
                    reference,
                    batch,
                    beta=online.beta,
                    mini_batch_count=config.algorithm.mini_batches,
                    train=config.train,
                    timer=timer,
                    skipped=skipped,
                )
            else:
                metrics = update(
                    actor,
                    reference,
                    batch,
                    algorithm=config.algorithm,
                    train=config.train,
                    timer=timer,
                    skipped=skipped,
                    longest_reply=config.rollout.max_new_tokens,
                )
        if reporter:
            reporter.trained(saving.done, batch.metrics, metrics)
        skipped.check(saving.done)
        return metrics

    def compare_logprobs(metrics: Mapping[str, float], sync: SyncReport | None) -> None:
        # a request in flight across the sync can have kept a prefix cache of older weights; rank 0 knows
        comparable = sync is not None and (sync.flushed or not config.driver.max_staleness)
        with fail_together(grid, "the check of the engines' log-probs", config.run.dir):
            if grid.is_main and comparable:
                require_same_weights(metrics, config.sync.max_logprob_gap)

    def publish_weights() -> SyncReport | None:
        with timer("weight_sync"):
            return engines.publish(saving.done)

    def report_step(batch: RolloutBatch, metrics: Mapping[str, float], sync: SyncReport | None) -> None:
        with fail_together(grid, "reporting", config.run.dir):
            if reporter:
                reporter.step(saving.done, batch.metrics, metrics, sync, timer.drain(), batch.samples, batch.shown)

    def save_checkpoint() -> None:
        with timer("checkpoint"):
            saving.save()
        with fail_together(grid, "reporting", config.run.dir):
            if reporter:
                reporter.saved(saving.done, timer.drain())

    with saving.before_any_end():
        sync = engines.publish(saving.done)
        evaluations.evaluate_at_start(saving.done)
        evaluations.evaluate_missing(first_step)
        while saving.done < total:
            with profiler.step(saving.done + 1), timer("step"):
                batch = wait_for_batch()
                engines.make_room()
                metrics = update_policy(batch)
                compare_logprobs(metrics, sync)
                sync = publish_weights()
            report_step(batch, metrics, sync)  # before the checkpoint: a resume from it does not run this step again
            if saving.due():
                save_checkpoint()
            evaluations.evaluate_if_due(saving.done)
        saving.go_on()
    checkpoints.wait()
    if reporter:
        engines.write_probe()
        reporter.close()
    engines.close()
    close_grid()


def require_same_weights(metrics: Mapping[str, float], max_gap: float) -> None:
    """Compare log-probs of engine and trainer for the tokens that the current weights sampled, if there are any.

    Raises RunError if they differ: further training would silently be off-policy."""
    gap = metrics.get("train/on_policy_gap", 0.0)
    if not gap <= max_gap:
        raise RunError(
            f"trainer and engine log-probs differ by {gap:.3g} on average (sync.max_logprob_gap is {max_gap:g}): "
            "the engine does not serve the trainer's weights; set sync.verify_every=1 to find the tensor"
        )


def main() -> None:
    arguments = parse_arguments(__doc__)
    set_up_logging(arguments.who)
    config = load_config(RLConfig, arguments.config, arguments.overrides)
    keep_from_others(config.run.umask)
    if arguments.trainer is not None:
        run_rank(partial(train, config, arguments.trainer))
    from collab_megatron.launch.end_report import report_at_end
    from collab_megatron.launch.epochs import epochs_to_steps
    from collab_megatron.launch.lock import run_lock
    from collab_megatron.launch.many_nodes import job_node, joined_job
    from collab_megatron.launch.preflight import RLStart, check_rl
    from collab_megatron.launch.record_checks import check_replay
    from collab_megatron.launch.run_processes import launch_rl, launch_trainers

    config = epochs_to_steps(config)
    check = check_rl if config.replay is None else check_replay
    if arguments.dry_run:
        print(show_config(config), flush=True)
        check(config, dry_run=True, node=arguments.node)
        return
    # the lock comes before the checks: they look for checkpoints
    with joined_job(arguments.job) as link, run_lock(config.run, config.train.save_grace_s) as lock:
        start = check(config, node=job_node(link, arguments.node))
        with report_at_end(config.run, config.train.steps, arguments.config):
            if start.is_done:
                return
            if isinstance(start, RLStart):
                launch_rl(config, start, lock, link)
            else:
                launch_trainers(config, "collab_megatron.train_rl", lock, link)


if __name__ == "__main__":
    run_cli(main)
