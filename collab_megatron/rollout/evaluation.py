"""Evaluation: plays whole conversations on held-out tasks and averages their scores."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field, replace

from collab_megatron.concurrency import run_all
from collab_megatron.config.sections import EvaluationSection
from collab_megatron.errors import BudgetSpent, RunError
from collab_megatron.figures import Figure, Figures
from collab_megatron.rollout.api_model import ApiModel, play_with_api
from collab_megatron.rollout.evaluation_tasks import has_both, sample_tasks, with_simulated_opening
from collab_megatron.rollout.future import STOPS_ALL, Limits, Players
from collab_megatron.rollout.group import TreeId, play_once
from collab_megatron.rollout.llm.accounting import CALLS
from collab_megatron.rollout.metrics import evaluation_metrics
from collab_megatron.rollout.rewards.aggregate import DEFAULT_CLAMPS, Clamps
from collab_megatron.rollout.rewards.scorer import is_of_own_metric
from collab_megatron.run_order import POSITION, RunPosition
from collab_megatron.types import (
    CallRecord,
    Future,
    Generation,
    Group,
    PolicyTurn,
    Reply,
    RolloutStatus,
    Task,
    UserSimulator,
)
from collab_megatron.wire.protocol import Tally


@dataclass(frozen=True)
class Evaluation:
    """The outcome of an evaluation."""

    figures: Figures  # those of a further user as users/NAME/...
    groups: tuple[Group, ...]  # one conversation each: one reply, one future; `kept` if it has a reward
    wanted: int  # conversations of this shard, with all users
    stop: str = ""  # why the rest was not started
    others: Mapping[str, tuple[Group, ...]] = field(default_factory=dict)  # further user -> its conversations

    @property
    def by_user(self) -> dict[str, tuple[Group, ...]]:
        """User -> its conversations; "" is the user of the config."""
        return {"": self.groups, **self.others}

    @property
    def done(self) -> int:
        """Conversations that were played."""
        return sum(map(len, self.by_user.values()))

    @property
    def tally(self) -> Tally:
        """Failed conversations. The trainer, which sees all shards, decides whether they are too many."""
        failures = [group.error for groups in self.by_user.values() for group in groups if not group.kept]
        return Tally(self.done, len(failures), failures[0] if failures else "")


async def evaluate(
    tasks: Sequence[Task],
    *,
    evaluation: EvaluationSection,
    weights: Mapping[str, float],
    clamps: Clamps = DEFAULT_CLAMPS,
    limits: Limits,
    players: Players,
    step: int = 0,
    shard: int = 0,
    shards: int = 1,
    within: Callable[[], AbstractAsyncContextManager[object]] = nullcontext,
    users: Mapping[str, UserSimulator] | None = None,
    api: ApiModel | None = None,
) -> Evaluation:
    """Play this shard's share of the sampled tasks with each of `users`; `api` plays in the place of the policy.

    users: name -> simulated user, that of the config as "" and first; None: that of `players` alone.

    A conversation that fails, or is unfinished at `evaluation.timeout_s`, is counted and enters no mean. Every
    conversation runs `within` a reservation of the budget. After BudgetSpent no more conversations start; those that
    have started are finished. A task has the same sample index at every step, so equal calls to user and judges come
    from the journal.

    Waits for budget and conversations, at most `evaluation.timeout_s`. Raises NoEngineLeft, ReplayMiss, and a bug of
    the user's own metric.
    """
    limits = replace(
        limits,
        temperature=evaluation.temperature,
        max_assistant_turns=evaluation.max_assistant_turns,
        max_user_turns=evaluation.max_assistant_turns,
        keep_contexts=False,
        cut_reply="score" if limits.cut_reply == "penalty" else limits.cut_reply,  # measured, not penalized
    )
    players = replace(players, second_judge=None)
    simulated = evaluation.simulated_opening
    cast = {name: replace(players, user=user) for name, user in (users or {"": players.user}).items()}
    slots = asyncio.Semaphore(max(1, evaluation.max_concurrency // shards))
    stop = ""

    async def play(name: str, number: int, task: Task) -> Group | None:
        nonlocal stop
        async with slots:
            if stop:
                return None
            # the journal files an evaluation under the step before it: step - 1, counted from 0
            tree_id = TreeId(step - 1, number, f"eval/{step}/{number}", first_sample=-1 - number)
            try:
                async with within():
                    return await _play(task, tree_id, simulated=simulated, limits=limits, players=cast[name], api=api)
            except BudgetSpent as spent:
                stop = stop or str(spent)
                return None

    chosen = sample_tasks(tasks, evaluation.num_tasks, evaluation.seed, openings_only=evaluation.simulated_opening)
    mine = [(name, number, task) for name in cast for number, task in chosen[shard::shards]]
    start = time.monotonic()
    late = f"the evaluation reached its deadline of {evaluation.timeout_s:g} s (evaluation.timeout_s)"
    played = await run_all(
        (play(name, number, task) for name, number, task in mine),
        timeout_s=evaluation.timeout_s,
        late=lambda index: _failed(mine[index][2], RolloutStatus.LATE, late),
    )
    by_user: dict[str, list[Group]] = {name: [] for name in cast}
    for (name, _, _), group in zip(mine, played, strict=True):
        if group is not None:
            by_user[name].append(group)
    figures: Figures = {}
    for name, groups in by_user.items():
        found = evaluation_metrics(
            [(group.task, reply) for group in groups for reply in group.replies_G],
            weights,
            clamps,
            apart=has_both(chosen) and not evaluation.simulated_opening,
        )
        figures |= {f"users/{name}/{key}" if name else key: figure for key, figure in found.items()}
    figures["wall_s"] = Figure.of("max", [time.monotonic() - start])
    own, *others = by_user.items()
    return Evaluation(figures, tuple(own[1]), len(mine), stop, others={name: tuple(groups) for name, groups in others})


def evaluation_calls(evaluation: EvaluationSection, judges: int) -> int:
    """The most LLM requests of one conversation, without retries; `judges`: those for its scores."""
    return evaluation.max_assistant_turns - 1 + int(evaluation.simulated_opening) + judges


async def _play(
    task: Task, tree_id: TreeId, *, simulated: bool, limits: Limits, players: Players, api: ApiModel | None
) -> Group:
    """One conversation. Waits for user, policy and judges. Raises only STOPS_ALL and a bug of the user's own metric."""
    POSITION.set(RunPosition(tree_id.step))
    status = RolloutStatus.SIMULATOR_FAILED
    calls: list[CallRecord] = []  # before the future: the simulated opening, the first turn of an API model
    before = CALLS.set(calls)
    try:
        if simulated:
            with players.user_clock:
                task = await with_simulated_opening(
                    task, players.user, sample_index=tree_id.first_sample, signal=limits.termination_signal
                )
        status = RolloutStatus.ENGINE_FAILED
        if api is None:
            reply = await play_once(task, tree_id, limits=limits, players=players)
        else:
            reply = await play_with_api(task, tree_id, api, limits=limits, players=players)
    except STOPS_ALL:
        raise
    except RunError as error:
        return _failed(task, status, str(error), calls)
    except Exception as error:
        if is_of_own_metric(error):
            raise
        words = players.unexpected.note(error, f"the conversation {tree_id} of task {task.task_id}")
        return _failed(task, RolloutStatus.UNEXPECTED_ERROR, words, calls)
    finally:
        CALLS.reset(before)
    (future,) = reply.futures_K
    reply = replace(reply, futures_K=(replace(future, calls=(*calls, *future.calls)),))
    prompt_ids = tuple(players.chat.prompt_ids(task.prompt))
    return Group(task, prompt_ids, (reply,), kept=reply.mr is not None, error=reply.futures_K[0].error)


def _failed(task: Task, status: RolloutStatus, error: str, calls: Sequence[CallRecord] = ()) -> Group:
    """A conversation without a policy turn."""
    nothing = PolicyTurn("", "", "", cut=False, generation=Generation((), (), (), finish_reason="failed"))
    future = Future(0, status, (), error=error, calls=tuple(calls))
    return Group(task, (), (Reply(nothing, (future,)),), kept=False, error=error)
