"""Whole conversations on held-out tasks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

from collab_megatron.config.sections import EvaluationSection
from collab_megatron.driver.conversation import Limits, Players
from collab_megatron.driver.figures import Figure, Figures
from collab_megatron.driver.group import TreeSeat, play_once
from collab_megatron.driver.metrics import evaluation_metrics
from collab_megatron.driver.protocol import Tally
from collab_megatron.driver.together import together
from collab_megatron.errors import RunError
from collab_megatron.types import Reply, Task


async def evaluate(
    tasks: Sequence[Task],
    *,
    evaluation: EvaluationSection,
    weights: dict[str, float],
    limits: Limits,
    players: Players,
    step: int = 0,
    shard: int = 0,
    shards: int = 1,
) -> tuple[Figures, list[tuple[Task, Reply]]]:
    """Play the first `num_tasks` tasks, of them this shard's; figures and the conversations themselves.

    The same task has the same sample index at every step: users and judges who are told the same answer the same, which
    the journal may know. Raises RunError at `evaluation.timeout_s`; NoEngineLeft and ReplayMiss as they come. Whether
    too many conversations failed is for those to say who see all shards (`tally`, protocol.require_most).
    """
    limits = replace(
        limits,
        temperature=evaluation.temperature,
        max_assistant_turns=evaluation.max_assistant_turns,
        max_user_turns=evaluation.max_assistant_turns,
        cut_reply="score" if limits.cut_reply == "penalty" else limits.cut_reply,  # measured, not punished
    )
    slots = asyncio.Semaphore(max(1, evaluation.max_concurrency // shards))

    async def play(number: int, task: Task) -> Reply:
        async with slots:
            # in the journal an evaluation belongs to the step after which it is made: step - 1, counted from 0
            seat = TreeSeat(step - 1, number, f"eval/{step}/{number}", first_sample=-1 - number)
            return await play_once(task, seat, limits=limits, players=players)

    chosen = list(enumerate(tasks[: evaluation.num_tasks]))[shard::shards]
    start = time.monotonic()
    try:
        replies = await asyncio.wait_for(
            together(play(number, task) for number, task in chosen), timeout=evaluation.timeout_s
        )
    except TimeoutError:
        raise RunError(f"driver: the evaluation took over {evaluation.timeout_s:g} s") from None
    plays = [(task, reply) for (_, task), reply in zip(chosen, replies, strict=True)]
    wall_s = Figure.of("max", [time.monotonic() - start])
    return evaluation_metrics(plays, weights) | {"wall_s": wall_s}, plays


def tally(plays: Sequence[tuple[Task, Reply]]) -> Tally:
    """How many of the conversations failed, and why one of them did."""
    failed = [reply.futures_K[0].error for _, reply in plays if reply.mr is None]
    return Tally(len(plays), len(failed), failed[0] if failed else "")
