"""One worker process of the data engine: many concurrent conversations on one event loop, one output shard."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from collab_megatron.concurrency import run_all
from collab_megatron.config.entry import BuildDatasetConfig
from collab_megatron.config.roles import llm_roles
from collab_megatron.data_engine.grow import BuildPlayers, GrowthRules, grow_conversation
from collab_megatron.data_engine.output import append_conversation, shard_path
from collab_megatron.data_engine.proactive import ProactivePrompt
from collab_megatron.data_engine.problems import Problem
from collab_megatron.data_engine.token_counter import token_counter
from collab_megatron.errors import BudgetSpent, RunError
from collab_megatron.rollout.journal.store import Journal, open_journal
from collab_megatron.rollout.llm import Gateway, SimulatorError, user_simulator
from collab_megatron.rollout.llm.accounting import RoleUsage
from collab_megatron.rollout.llm.budget import Budget
from collab_megatron.rollout.rewards import configured_scorer, judge_calls

HOPELESS_FAILURES = 50  # so many conversations that fail in a row end the build
REPORT_S = 1.0
LINEAGE = "build"  # selects policy turns in the journal, which a build does not have; LLM replies have no lineage


@dataclass
class BuildCounts:
    """Counts of one worker so far."""

    done: int = 0
    failed: int = 0
    failed_in_a_row: int = 0
    rows: int = 0
    turns: int = 0  # assistant turns of the finished conversations
    mr_sum: float = 0.0  # over the kept replies
    usage: dict[str, RoleUsage] = field(default_factory=dict)
    last_error: str = ""
    warning: str = ""  # about a soft cap of the budget
    spent: str = ""  # the budget's hard cap is reached, with advice


async def build_share(
    config: BuildDatasetConfig, problems: Sequence[Problem], worker: int, report: Callable[[BuildCounts], None]
) -> BuildCounts:
    """Grow a conversation from each problem, at most max_concurrency at a time; `report` is called about every second.

    Replies in the journal are reused. A conversation starts while the budget has room for it and all running ones;
    running ones are finished. A failed conversation is counted and left out.

    Waits for all conversations; every LLM call has a deadline. Raises UserError if an LLM cannot be reached, RunError
    if HOPELESS_FAILURES conversations fail in a row or the disk is full.
    """
    with closing(open_journal(config.journal, journal_path(config), LINEAGE)) as journal:
        return await _build_share(config, problems, worker, report, journal)


def journal_path(config: BuildDatasetConfig) -> Path:
    """The journal of the build, one file for all its processes."""
    return config.journal.path or config.output / "journal.sqlite"


async def _build_share(
    config: BuildDatasetConfig,
    problems: Sequence[Problem],
    worker: int,
    report: Callable[[BuildCounts], None],
    journal: Journal,
) -> BuildCounts:
    gateway = Gateway(
        llm_roles(config.simulators, config.reward),
        config.seed,
        journal=journal,
        budget=config.budget,
        go_on="run the same command again",
    )
    counts = BuildCounts()
    append = partial(append_conversation, shard_path(config.output, worker), nested=config.form == "nested")
    try:
        await gateway.check_reachable()
        players = make_players(config, gateway)
        rules = GrowthRules(
            num_candidates=config.num_candidate_responses,
            num_futures=config.num_repeat_rollouts,
            max_total_turns=config.max_total_turns,
            max_user_turns=config.max_user_turns,
            num_proactive=config.num_proactive_candidates,
            system_prompt=config.system_prompt,
            termination_signal=config.simulators.user.termination_signal,
        )
        judges = judge_calls(config.reward, config.simulators)
        # LiteLLM's modules have hundreds of thousands of objects: full garbage collections skip them from here on
        gc.freeze()
        queue = iter(problems)
        growers = [
            _grow_from(queue, rules, players, append, counts, gateway.budget, judges)
            for _ in range(min(config.max_concurrency, len(problems)))
        ]
        done = asyncio.Event()
        await run_all([_grow_all(growers, done), _report_often(counts, gateway, report, done)])
    finally:
        await gateway.close()
    _note_costs(counts, gateway)
    report(counts)
    return counts


def make_players(config: BuildDatasetConfig, gateway: Gateway) -> BuildPlayers:
    """Everybody that the config describes. Raises UserError for a bad prompt file or tokenizer."""
    user = user_simulator(config.simulators, gateway)
    return BuildPlayers(
        assistant=gateway.role("assistant"),
        user=user,
        together=user,
        scorer=configured_scorer(config.reward, config.simulators, gateway),
        count_tokens=token_counter(config.counting_tokenizer),
        proactive=ProactivePrompt(config.proactive_prompt_file) if config.num_proactive_candidates else None,
    )


async def _grow_from(
    queue: Iterator[Problem],
    rules: GrowthRules,
    players: BuildPlayers,
    append: Callable[[Sequence[Mapping[str, Any]]], None],
    counts: BuildCounts,
    budget: Budget,
    judges: int,
) -> None:
    """Grow conversations from the queue until it is empty or the budget is spent, and `append` their rows; `judges`:
    their requests per future.

    Waits for room in the budget, unblocked by finished conversations, and for LLM calls. Raises RunError if too many
    conversations fail in a row.
    """
    for problem in queue:
        try:
            async with budget.room(rules.calls_at_most(judges, opening=not problem.task.prompt)):
                rows = await grow_conversation(problem, rules, players)
        except BudgetSpent as spent:
            counts.spent = str(spent)
            return
        except SimulatorError as error:
            counts.failed += 1
            counts.failed_in_a_row += 1
            counts.last_error = str(error)
            if counts.failed_in_a_row >= HOPELESS_FAILURES:
                raise RunError(
                    f"{counts.failed_in_a_row} conversations failed in a row; the last: {error}; correct the cause and "
                    "run the same command again"
                ) from None
            continue
        append(rows)
        best = _best_scores(rows)
        counts.failed_in_a_row = 0
        counts.done += 1
        counts.rows += len(rows)
        counts.turns += len(best)
        counts.mr_sum += sum(best)


def _best_scores(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """The score of the kept reply of each turn."""
    best: dict[int, float] = {}
    for row in rows:
        best[row["turn_id"]] = max(row["score"], best.get(row["turn_id"], row["score"]))
    return list(best.values())


async def _grow_all(growers: Sequence[Coroutine[Any, Any, None]], done: asyncio.Event) -> None:
    """Waits for all growers, then sets `done`. Raises what the first to fail raises."""
    await run_all(growers)
    done.set()


async def _report_often(
    counts: BuildCounts, gateway: Gateway, report: Callable[[BuildCounts], None], done: asyncio.Event
) -> None:
    """Post a copy of the counts every REPORT_S. Unblocked by `done`."""
    while not done.is_set():
        with suppress(TimeoutError):
            await asyncio.wait_for(done.wait(), REPORT_S)
        _note_costs(counts, gateway)
        report(replace(counts))


def _note_costs(counts: BuildCounts, gateway: Gateway) -> None:
    counts.usage = dict(gateway.snapshot().roles)
    counts.warning = counts.warning or next(iter(gateway.budget.warnings()), "")
