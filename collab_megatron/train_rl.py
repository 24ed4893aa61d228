"""Reinforcement learning with multiturn-aware rewards.

    python -m collab_megatron.train_rl conf/demo_rl.yaml [section.key=value ...] [--dry-run]

A step's life: the driver samples n replies per prompt from the engines, plays K futures of each against the simulated
user, judges them and turns the rewards into group advantages; the trainer scores the replies under the reference, takes
a clipped policy-gradient step, and publishes the new weights to the engines, with proof that they arrived. `main`
launches engines, driver and trainer ranks on this node; `train` is what every trainer rank runs.
"""

from __future__ import annotations

from collections.abc import Mapping

from collab_megatron.cluster.cli import TrainerArguments, parse_arguments
from collab_megatron.config import RLConfig, dump_config, load_config
from collab_megatron.errors import NoEngineLeft, RunError, RunStops, WeightsDiffer, run_cli
from collab_megatron.log import set_up_logging
from collab_megatron.types import RolloutBatch


def train(config: RLConfig, arguments: TrainerArguments) -> None:
    """The loop of one trainer rank."""
    # heavy and megatron-bound: the launcher, which shares this file, must start without them
    from collab_megatron.actor.actor import Actor
    from collab_megatron.actor.grid import close_grid, init_grid
    from collab_megatron.actor.reference import build_reference
    from collab_megatron.checkpoint.run import Checkpoints
    from collab_megatron.monitor.timers import PhaseTimer
    from collab_megatron.resharding.probe import probe_ids
    from collab_megatron.resharding.publisher import Publisher
    from collab_megatron.training.engine_probe import write_engine_probe
    from collab_megatron.training.engines import Engines
    from collab_megatron.training.inbox import Inbox
    from collab_megatron.training.reporter import Reporter
    from collab_megatron.training.rl_step import update

    grid = init_grid(config.parallel, config.run.seed)
    total = config.train.steps
    actor = Actor.build(
        config.model.path,
        dtype=config.model.dtype,
        grid=grid,
        optimizer=config.optimizer,
        total_steps=total * config.algorithm.mini_batches,
        recompute=config.train.recompute,
        logits_chunk_mb=config.train.logits_chunk_mb,
    )
    reference = build_reference(actor, config.algorithm, logits_chunk_mb=config.train.logits_chunk_mb)
    checkpoints = Checkpoints(
        actor,
        config.run,
        config.train,
        config=config.model_dump(mode="json"),
        rows_per_step=config.rollout.prompts_per_step,
    )
    first_step = checkpoints.resume()

    arguments.wait_for_engine(config.engine.startup_timeout_s)
    inbox = Inbox(
        grid,
        driver_addresses=arguments.driver_addresses(config.driver.shards, config.engine.startup_timeout_s),
        step_timeout_s=config.rollout.step_timeout_s,
        eval_timeout_s=config.evaluation.timeout_s,
    )
    publisher = Publisher(
        actor,
        roster=arguments.roster_folder(),
        engine=config.engine,
        sync=config.sync,
        probe_ids=probe_ids(config.model.path),
        run_dir=config.run.dir,
    )
    engines = Engines(publisher, inbox)
    reporter = Reporter(config, first_step=first_step) if grid.is_main else None
    timer = PhaseTimer()

    def evaluate(step: int) -> None:
        if config.data.validation is not None:
            figures = engines.evaluate(step)
            if reporter:
                reporter.evaluation(step, figures)

    done = saved = first_step
    trained: RolloutBatch | None = None  # the newest that had samples
    try:
        engines.publish(done)
        if config.train.eval_at_start and done == 0:
            evaluate(0)
        while done < total:
            with timer("step"):
                with timer("wait_for_rollout"):
                    batch = engines.next_batch(done, checkpoints.saved)
                trained = batch if batch.samples else trained
                engines.make_room()
                metrics = update(
                    actor,
                    reference,
                    batch,
                    algorithm=config.algorithm,
                    train=config.train,
                    timer=timer,
                )
                require_same_weights(metrics, config.sync.max_logprob_gap)
                done += 1
                with timer("weight_sync"):
                    sync = engines.publish(done)
            interval = config.train.save_interval
            if done == total or (interval and done % interval == 0):
                with timer("checkpoint"):
                    checkpoints.save(done)
                saved = done
            if reporter:
                reporter.step(done, batch.metrics, metrics, sync, timer.drain())
            if done == total or (config.train.eval_interval and done % config.train.eval_interval == 0):
                evaluate(done)
    except (NoEngineLeft, WeightsDiffer, RunStops):  # the trainer's own state is well
        if done > saved:  # the run stops here, with nothing lost
            checkpoints.save(done)
        checkpoints.wait()
        raise
    checkpoints.wait()
    if reporter:
        if trained is not None:
            write_engine_probe(config, publisher.control, trained)
        reporter.close()
    inbox.close()
    publisher.close()
    close_grid()


def require_same_weights(metrics: Mapping[str, float], max_gap: float) -> None:
    """Engine and trainer must agree on what the weights of now sampled; without such a token nothing can be said.

    Raises RunError: training on would be silently off-policy."""
    gap = metrics.get("train/on_policy_gap", 0.0)
    if not gap <= max_gap:
        raise RunError(
            f"trainer and engine log-probs differ by {gap:.3g} on average (sync.max_logprob_gap is {max_gap:g}): "
            "the engine does not serve the trainer's weights"
        )


def main() -> None:
    arguments = parse_arguments(__doc__)
    set_up_logging(arguments.who)
    config = load_config(RLConfig, arguments.config, arguments.overrides)
    if arguments.trainer is not None:
        train(config, arguments.trainer)
        return
    from collab_megatron.cluster.launch import launch_rl
    from collab_megatron.cluster.preflight import check_rl

    if arguments.dry_run:
        print(dump_config(config), flush=True)
    start = check_rl(config, dry_run=arguments.dry_run, node=arguments.node)
    if arguments.dry_run:
        return
    launch_rl(config, start)


if __name__ == "__main__":
    run_cli(main)
