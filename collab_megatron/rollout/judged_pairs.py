"""Win rates: each model's conversations against the baseline's on the same tasks, by an LLM judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from collab_megatron.concurrency import run_all
from collab_megatron.config import EvaluateConfig
from collab_megatron.config.roles import llm_roles
from collab_megatron.rollout.comparison import Cell, Wins, messages_of
from collab_megatron.rollout.evaluation_tasks import sample_tasks
from collab_megatron.rollout.journal.store import Journal
from collab_megatron.rollout.llm import Gateway, SimulatorError
from collab_megatron.rollout.llm.budget import Budget
from collab_megatron.rollout.llm.pair_judge import CALLS_OF_PAIR, PairJudge, pair_judge
from collab_megatron.run_order import POSITION, RunPosition
from collab_megatron.types import Group


async def judge_cells(config: EvaluateConfig, cells: Sequence[Cell], baseline: str, journal: Journal) -> list[Cell]:
    """The cells with their wins against the baseline's cell of the same user. Verdicts in the journal are not asked for
    again.

    Waits for the judge. Raises BudgetSpent, and UserError for a missing key or a bad prompt file.
    """
    bases = {cell.user: cell for cell in cells if cell.model == baseline}
    found = []
    for cell in cells:
        base = bases.get(cell.user)
        if base is None or cell.model == baseline:
            found.append(cell)
            continue
        # one gateway for each cell: its counters are the cell's cost
        gateway = Gateway(
            llm_roles(config.simulators, config.reward),
            config.run.seed,
            journal=journal,
            budget=config.budget,
            go_on="start the evaluation again",
        )
        try:
            judge = pair_judge(config.simulators, config.compare, gateway)
            wins = await judged(cell.scored, base.scored, judge, config.compare.judged_pairs, config, gateway.budget)
            found.append(replace(cell, wins=replace(wins, cost_usd=gateway.snapshot().cost_usd)))
        finally:
            await gateway.close()
    return found


async def judged(
    mine: Mapping[str, Group],
    theirs: Mapping[str, Group],
    judge: PairJudge,
    most: int,
    config: EvaluateConfig,
    budget: Budget,
) -> Wins:
    """Points on `most` of the tasks that both have. Every pair runs within a reservation of the budget. Waits for the
    judge. Raises BudgetSpent."""
    POSITION.set(RunPosition(-1))
    common = [mine[task_id].task for task_id in sorted(mine.keys() & theirs.keys())]
    chosen = [task for _, task in sample_tasks(common, most, config.evaluation.seed)]

    async def points(group: Group, other: Group) -> float | None:
        async with budget.room(CALLS_OF_PAIR):
            try:
                return await judge.points(group.task, messages_of(group), messages_of(other), sample_index=0)
            except SimulatorError:
                return None

    verdicts = await run_all(points(mine[task.task_id], theirs[task.task_id]) for task in chosen)
    known = {task.task_id: value for task, value in zip(chosen, verdicts, strict=True) if value is not None}
    return Wins(known, failed=len(chosen) - len(known))
