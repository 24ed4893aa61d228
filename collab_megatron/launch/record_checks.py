"""Checks before the start of a replay, which trains on a record, and of collect, which makes one (see preflight.py)."""

from __future__ import annotations

import asyncio

from collab_megatron.config import RLConfig
from collab_megatron.config.sections import ParallelSection
from collab_megatron.data.parquet import read_task_files
from collab_megatron.data.token_limit import max_context_tokens
from collab_megatron.launch.config_warnings import warn_of_memory, warn_of_players
from collab_megatron.launch.cost import lengths_of, step_calls
from collab_megatron.launch.engine_checks import check_context_length
from collab_megatron.launch.machine_checks import check_disk_space, check_gpus, check_trainer, started_ranks
from collab_megatron.launch.node import Node, this_node
from collab_megatron.launch.path_checks import check_journal_file, check_run
from collab_megatron.launch.plan import collect_plan, replay_plan
from collab_megatron.launch.preflight import (
    Report,
    check_engines,
    check_model,
    check_players,
    check_reachable,
    fitting_prompts,
    print_at_once,
    report_placement,
)
from collab_megatron.launch.start_point import StartPoint, find_start
from collab_megatron.rollout.replay import open_replay
from collab_megatron.wire.completion import rl_missing


def check_replay(
    config: RLConfig, *, dry_run: bool = False, node: Node | None = None, report: Report = print_at_once
) -> StartPoint:
    """All checks of train_rl with replay.record, as preflight.check_rl; reads the whole record. Raises UserError."""
    node = node or this_node()
    model = check_model(config.model.path, config.parallel, config.rollout.inexact_template, weights=not dry_run)
    size = open_replay(config).size()
    report(replay_plan(config, model.spec, node=node, size=size))
    report_placement(node, config.parallel, report)
    warn_of_memory(config, model.spec, node)
    start = find_start(config, rl_missing, node)
    if not start.is_done:
        check_trainer(config.parallel, None, node)
        if node.here:
            check_disk_space(config.run.dir, model.spec, config.model.dtype)
    return start


def check_collect(
    config: RLConfig, *, dry_run: bool = False, node: Node | None = None, report: Report = print_at_once
) -> int:
    """All checks of collect, as preflight.check_rl; returns the context length in tokens. Raises UserError."""
    node = node or this_node()
    one_rank = ParallelSection(device=config.parallel.device)
    model = check_model(config.model.path, one_rank, config.rollout.inexact_template, weights=not dry_run)
    check_context_length(config.engine, model.spec)
    context_tokens = max_context_tokens(model.hf_config, config.engine)
    tasks, _ = read_task_files(config.data.train_files)
    fit = fitting_prompts(config, tasks, model.chat, context_tokens)
    if fit.notice and dry_run:  # in a run the driver prints it
        print(fit.notice, flush=True)
    gateway = check_players(config, node)
    calls = step_calls(config, lengths_of(fit.kept))
    report(collect_plan(config, model.spec, node=node, prompts=len(fit.kept), calls=calls))
    warn_of_players(config)
    check_gpus(config.parallel, started_ranks(config.engine), node)
    if node.here:
        check_run(config.run)
        check_journal_file(config.journal, config.run.dir / "journal" / f"{config.run.name}.sqlite")
    check_engines(config, node)
    asyncio.run(check_reachable(gateway, node))
    return context_tokens
