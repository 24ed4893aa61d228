"""One worker process of the data engine: many conversations at a time on one event loop, one shard."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from collab_megatron.config.entry import BuildDatasetConfig
from collab_megatron.config.roles import llm_roles
from collab_megatron.data_engine.grow import Growth, Players, grow_conversation
from collab_megatron.data_engine.problems import Problem
from collab_megatron.data_engine.shards import append_conversation, shard_path
from collab_megatron.errors import BudgetSpent, RunError
from collab_megatron.rollout.journal.store import Journal, open_journal
from collab_megatron.rollout.llm import Gateway, SimulatorError, user_simulator
from collab_megatron.rollout.llm.accounting import RoleUsage
from collab_megatron.rollout.llm.budget import Budget
from collab_megatron.rollout.rewards import configured_scorer, judge_calls
from collab_megatron.rollout.rewards.scorer import first_error

HOPELESS_FAILURES = 50  # conversations that fail in a row before the build gives up
REPORT_S = 1.0
LINEAGE = "build"  # decides what policy turns are found again, and a build has none; replies are found under any


@dataclass
class Tally:
    """What one worker did so far."""

    done: int = 0
    failed: int = 0
    failed_in_a_row: int = 0
    rows: int = 0
    turns: int = 0  # assistant turns of the finished conversations
    mr_sum: float = 0.0  # over the kept replies
    usage: dict[str, RoleUsage] = field(default_factory=dict)
    last_error: str = ""
    warning: str = ""  # a soft cap of the budget was passed
    spent: str = ""  # the budget's hard cap was reached with work left: what to do


async def build_share(
    config: BuildDatasetConfig, problems: Sequence[Problem], worker: int, report: Callable[[Tally], None]
) -> Tally:
    """Grow a conversation from each problem, at most max_concurrency at a time; `report` is called about every second.

    What the journal has is not asked for again. A conversation is begun as long as the budget has room for all under
    way; those are finished. A conversation that fails is counted and left out. Raises UserError if a role cannot be
    reached at all, RunError if HOPELESS_FAILURES conversations fail in a row or the disk is full.
    """
    with closing(open_journal(config.journal, journal_path(config), LINEAGE)) as journal:
        return await _build_share(config, problems, worker, report, journal)


def journal_path(config: BuildDatasetConfig) -> Path:
    """Where the build's journal lies, one file for all its processes."""
    return config.journal.path or config.output / "journal.sqlite"


async def _build_share(
    config: BuildDatasetConfig,
    problems: Sequence[Problem],
    worker: int,
    report: Callable[[Tally], None],
    journal: Journal,
) -> Tally:
    gateway = Gateway(
        llm_roles(config.simulators, config.reward),
        config.seed,
        journal=journal,
        budget=config.budget,
        go_on="give the same command again",
    )
    tally = Tally()
    shard = shard_path(config.output, worker)
    try:
        await gateway.check_reachable()
        players = make_players(config, gateway)
        growth = Growth(
            num_candidates=config.num_candidate_responses,
            num_futures=config.num_repeat_rollouts,
            max_total_turns=config.max_total_turns,
            max_user_turns=config.max_user_turns,
            system_prompt=config.system_prompt,
            termination_signal=config.simulators.user.termination_signal,
        )
        judges = judge_calls(config.reward, config.simulators)
        # the modules behind LiteLLM are hundreds of thousands of objects that every full collection would walk
        gc.freeze()
        queue = iter(problems)
        async with asyncio.TaskGroup() as group:
            reporter = group.create_task(_report_often(tally, gateway, report))
            growers = [
                group.create_task(_grow_from(queue, growth, players, shard, tally, gateway.budget, judges))
                for _ in range(min(config.max_concurrency, len(problems)))
            ]
            await asyncio.gather(*growers)
            reporter.cancel()
    except ExceptionGroup as errors:
        raise first_error(errors) from None
    finally:
        await gateway.close()
    _note_costs(tally, gateway)
    report(tally)
    return tally


def make_players(config: BuildDatasetConfig, gateway: Gateway) -> Players:
    """The players of the config. Raises UserError for a bad prompt file or tokenizer."""
    return Players(
        assistant=gateway.role("assistant"),
        user=user_simulator(config.simulators, gateway),
        scorer=configured_scorer(config.reward, config.simulators, gateway),
        count_tokens=token_counter(config.tokenizer),
    )


def token_counter(tokenizer: str | None) -> Callable[[str], int]:
    """Counts a reply's tokens, its end-of-turn id included as in RL; white-space words where there is no tokenizer."""
    if tokenizer is None:
        return lambda text: len(text.split())
    fast = Path(tokenizer) / "tokenizer.json"
    if fast.exists():  # the same ids without the seconds that importing transformers takes in every process
        from tokenizers import Tokenizer

        counter = Tokenizer.from_file(str(fast))
        return lambda text: len(counter.encode(text, add_special_tokens=False).ids) + 1
    from collab_megatron.data.chat import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    return lambda text: len(loaded.encode(text, add_special_tokens=False)) + 1


async def _grow_from(
    queue: Iterator[Problem],
    growth: Growth,
    players: Players,
    shard: Path,
    tally: Tally,
    budget: Budget,
    judges: int,
) -> None:
    """Take problems until there are none left or the budget is spent; `judges`: requests to them a future.

    Raises RunError if too many fail in a row.
    """
    for problem in queue:
        try:
            async with budget.room(growth.calls_at_most(judges, opening=not problem.task.prompt)):
                rows = await grow_conversation(problem, growth, players)
        except BudgetSpent as spent:
            tally.spent = str(spent)
            return
        except SimulatorError as error:
            tally.failed += 1
            tally.failed_in_a_row += 1
            tally.last_error = str(error)
            if tally.failed_in_a_row >= HOPELESS_FAILURES:
                raise RunError(f"{tally.failed_in_a_row} conversations failed in a row; the last: {error}") from None
            continue
        append_conversation(shard, rows)
        best = _best_scores(rows)
        tally.failed_in_a_row = 0
        tally.done += 1
        tally.rows += len(rows)
        tally.turns += len(best)
        tally.mr_sum += sum(best)


def _best_scores(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """The score of the kept reply of each turn."""
    best: dict[int, float] = {}
    for row in rows:
        best[row["turn_id"]] = max(row["score"], best.get(row["turn_id"], row["score"]))
    return list(best.values())


async def _report_often(tally: Tally, gateway: Gateway, report: Callable[[Tally], None]) -> None:
    """Post the tally every REPORT_S until cancelled; a copy, since it goes on growing."""
    while True:
        await asyncio.sleep(REPORT_S)
        _note_costs(tally, gateway)
        report(replace(tally))


def _note_costs(tally: Tally, gateway: Gateway) -> None:
    tally.usage = dict(gateway.snapshot().roles)
    tally.warning = tally.warning or next(iter(gateway.budget.warnings()), "")
