"""The command of train_sft and train_dpo: in the launcher checks and the start of the ranks, in a rank its loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from collab_megatron.config import SupervisedConfig, load_config, show_config
from collab_megatron.errors import run_rank
from collab_megatron.files import keep_from_others
from collab_megatron.launch.cli import parse_arguments
from collab_megatron.log import set_up_logging

C = TypeVar("C", bound=SupervisedConfig)


def run_supervised(kind: type[C], module: str, description: str | None, train: Callable[[C, int], None]) -> None:
    """`python -m module ...`: parse the command line; launch the ranks, or be one of them and call `train` with
    the number of this attempt."""
    arguments = parse_arguments(description)
    set_up_logging(arguments.who)
    config = load_config(kind, arguments.config, arguments.overrides)
    keep_from_others(config.run.umask)
    if arguments.trainer is not None:
        run_rank(partial(train, config, arguments.trainer.attempt))
    from collab_megatron.launch.end_report import report_at_end
    from collab_megatron.launch.epochs import epochs_to_steps
    from collab_megatron.launch.lock import run_lock
    from collab_megatron.launch.many_nodes import job_node, joined_job
    from collab_megatron.launch.preflight import check_supervised
    from collab_megatron.launch.run_processes import launch_trainers

    config = epochs_to_steps(config)
    if arguments.dry_run:
        print(show_config(config), flush=True)
        check_supervised(config, dry_run=True, node=arguments.node)
        return
    # the lock comes before the checks: they look for checkpoints
    with joined_job(arguments.job) as link, run_lock(config.run, config.train.save_grace_s) as lock:
        start = check_supervised(config, node=job_node(link, arguments.node))
        with report_at_end(config.run, config.train.steps, None, exported=config.export_hf):
            if not start.is_done:
                launch_trainers(config, module, lock, link)
