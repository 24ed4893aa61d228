"""One step's rollouts: which prompts, their trees side by side, the batch for the trainer. And held-out evaluation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from collab_megatron.config.sections import AlgorithmSection, EvaluationSection, RolloutSection
from collab_megatron.data.order import step_indices
from collab_megatron.driver.conversation import Limits, Players
from collab_megatron.driver.group import grow_group, play_once, training_samples
from collab_megatron.driver.metrics import evaluation_metrics, rollout_metrics
from collab_megatron.driver.together import together
from collab_megatron.errors import RunError
from collab_megatron.types import Group, Reply, RolloutBatch, Task

FAILED_SHARE_LIMIT = 0.5
"""A step or evaluation that lost more than this share of its work stops the run: its figures would mean nothing."""


@dataclass(frozen=True)
class Collected:
    """What one step brought."""

    batch: RolloutBatch
    groups: tuple[Group, ...]


async def collect_step(
    step: int,
    tasks: Sequence[Task],
    *,
    seed: int,
    rollout: RolloutSection,
    algorithm: AlgorithmSection,
    weights: dict[str, float],
    limits: Limits,
    players: Players,
) -> Collected:
    """Grow all trees of `step` at once and deliver them in prompt order (strictly on-policy).

    Raises RunError at `rollout.step_timeout_s`, or if too many groups had to be dropped; NoEngineLeft as it
    comes. Whatever it raises, no conversation of the step is under way any more.
    """
    indices = step_indices(seed, step, num_rows=len(tasks), batch_size=rollout.prompts_per_step)
    start = time.monotonic()
    growing = (
        grow_group(
            tasks[i],
            num_replies=rollout.num_replies,
            num_futures=rollout.num_repeat_rollouts,
            min_replies=rollout.min_replies,
            advantage_eps=algorithm.advantage_eps,
            min_group_std=algorithm.min_group_std,
            limits=limits,
            players=players,
        )
        for i in indices
    )
    try:
        groups = await asyncio.wait_for(together(growing), timeout=rollout.step_timeout_s)
    except TimeoutError:
        raise RunError(f"driver: the rollouts of step {step} took over {rollout.step_timeout_s:g} s") from None
    dropped = [group for group in groups if not group.kept]
    if len(dropped) > FAILED_SHARE_LIMIT * len(groups):
        raise RunError(
            f"driver: {len(dropped)} of {len(groups)} groups of step {step} had to be dropped; {_first_error(dropped)}"
        )
    samples = tuple(sample for group in groups for sample in training_samples(group))
    metrics = rollout_metrics(groups, weights) | {"time_s/rollout": time.monotonic() - start}
    return Collected(batch=RolloutBatch(step=step, samples=samples, metrics=metrics), groups=tuple(groups))


async def evaluate(
    tasks: Sequence[Task],
    *,
    evaluation: EvaluationSection,
    weights: dict[str, float],
    limits: Limits,
    players: Players,
) -> tuple[dict[str, float], list[tuple[Task, Reply]]]:
    """Play whole conversations on the first `num_tasks` tasks; figures and the conversations themselves.

    Raises RunError at `evaluation.timeout_s`, or if over half of the conversations failed; NoEngineLeft as it comes.
    """
    limits = replace(
        limits,
        temperature=evaluation.temperature,
        max_assistant_turns=evaluation.max_assistant_turns,
        max_user_turns=evaluation.max_assistant_turns,
    )
    slots = asyncio.Semaphore(evaluation.max_concurrency)

    async def play(task: Task) -> Reply:
        async with slots:
            return await play_once(task, limits=limits, players=players)

    chosen = tasks[: evaluation.num_tasks]
    start = time.monotonic()
    try:
        replies = await asyncio.wait_for(together(map(play, chosen)), timeout=evaluation.timeout_s)
    except TimeoutError:
        raise RunError(f"driver: the evaluation took over {evaluation.timeout_s:g} s") from None
    plays = list(zip(chosen, replies, strict=True))
    failed = [reply.futures_K[0] for reply in replies if reply.mr is None]
    if len(failed) > FAILED_SHARE_LIMIT * len(plays):
        raise RunError(f"driver: {len(failed)} of {len(plays)} held-out conversations failed; {failed[0].error}")
    return evaluation_metrics(plays, weights) | {"wall_s": time.monotonic() - start}, plays


def _first_error(groups: Sequence[Group]) -> str:
    errors = (f.error for group in groups for reply in group.replies_G for f in reply.futures_K if f.error)
    return next(errors, "no future was scored")
