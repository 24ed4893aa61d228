"""One prompt's conversation tree: n replies, K futures each, all at once; then MR and the group's advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from collab_megatron.concurrency import run_all
from collab_megatron.rollout.advantages import group_advantages
from collab_megatron.rollout.future import Limits, Players, ask_policy, play_future
from collab_megatron.rollout.rewards import multiturn_reward
from collab_megatron.run_order import POSITION, RunPosition
from collab_megatron.types import Future, Group, PolicyTurn, Reply, RolloutStatus, Task, TrainingSample
from collab_megatron.wire.protocol import Tally


@dataclass(frozen=True)
class GroupRules:
    """What makes a group, and what is left of it."""

    num_replies: int  # n
    num_futures: int  # K; 0 scores each reply as it stands
    min_replies: int  # with fewer scored replies the group is dropped
    min_futures: int  # with fewer scored futures the reply leaves its group
    group_timeout_s: float  # from the replies on; then the group is taken with the futures that are there
    advantage_eps: float
    min_group_std: float


@dataclass(frozen=True)
class TreeId:
    """Where a tree sits in the run."""

    step: int  # training step for which it was begun
    slot: int  # its place among the prompts of that step
    name: str = ""  # unique in the run; empty: made of the two
    first_sample: int = 0  # sample index of its first future; the others count up from there

    def __str__(self) -> str:
        return self.name or f"{self.step}/{self.slot}"


async def grow_group(
    task: Task,
    prompt_ids: Sequence[int],
    turns_G: Sequence[PolicyTurn],
    tree_id: TreeId,
    *,
    rules: GroupRules,
    limits: Limits,
    players: Players,
) -> Group:
    """Play every future of every reply concurrently; at the group's deadline those that are not there are cancelled.

    The K futures of a reply that nobody can answer (`limits.cut_reply`) are one and the same conversation: it is judged
    once, and all K carry its scores, so that counts and `min_futures` mean what they mean elsewhere.

    Raises only what play_future raises; failed, late and cancelled futures are statuses.
    """
    count = max(rules.num_futures, 1)
    played = [(g, k) for g, turn in enumerate(turns_G) for k in range(1 if limits.breaks_off(turn) else count)]
    late = f"its group was taken after {rules.group_timeout_s:g} s"
    results = await run_all(
        (
            play_future(
                task,
                prompt_ids,
                turns_G[g],
                index=k,
                name=f"{tree_id}/{g}/{k}",
                sample_index=tree_id.first_sample + g * count + k,
                simulate=rules.num_futures > 0,
                limits=limits,
                players=players,
            )
            for g, k in played
        ),
        timeout_s=rules.group_timeout_s,
        late=lambda number: Future(played[number][1], RolloutStatus.LATE, (), error=late),
    )
    futures = dict(zip(played, results, strict=True))
    for g in range(len(turns_G)):
        for k in range(1, count):
            futures.setdefault((g, k), replace(futures[g, 0], index=k, calls=()))
    replies = tuple(
        _reply(turn, [futures[g, k] for k in range(count)], rules.min_futures) for g, turn in enumerate(turns_G)
    )
    return with_advantages(
        Group(task=task, prompt_ids=tuple(prompt_ids), replies_G=replies, kept=True),
        min_replies=rules.min_replies,
        eps=rules.advantage_eps,
        min_std=rules.min_group_std,
    )


def _reply(turn: PolicyTurn, futures: Sequence[Future], min_futures: int) -> Reply:
    enough = sum(future.status.scored for future in futures) >= min_futures
    return Reply(
        turn=turn,
        futures_K=tuple(futures),
        mr=multiturn_reward(futures) if enough else None,
    )


def with_advantages(group: Group, *, min_replies: int, eps: float, min_std: float) -> Group:
    """The group with advantages over the replies that have a reward; dropped if fewer than `min_replies` have one.

    Missing is not zero: a reply without a scored future leaves its group instead of pulling the mean down.
    """
    scored = [reply.mr for reply in group.replies_G if reply.mr is not None]
    if len(scored) < max(min_replies, 2):
        return replace(group, kept=False)
    advantages = iter(group_advantages(scored, eps=eps, min_std=min_std))
    replies = tuple(
        reply if reply.mr is None else replace(reply, advantage=next(advantages)) for reply in group.replies_G
    )
    return replace(group, replies_G=replies)


def has_spread(group: Group) -> bool:
    """Whether the group teaches anything: kept, and not all advantages 0."""
    return group.kept and any(reply.advantage for reply in group.replies_G)


def tally(groups: Sequence[Group]) -> Tally:
    """How many of the groups had to be dropped, and something that went wrong with one of them."""
    dropped = [group for group in groups if not group.kept]
    why = [group.error for group in dropped if group.error]
    why += [f.error for group in dropped for reply in group.replies_G for f in reply.futures_K if f.error]
    return Tally(len(groups), len(dropped), why[0] if why else "no future was scored" if dropped else "")


def training_samples(group: Group, zero_advantage: Literal["keep", "drop"]) -> list[TrainingSample]:
    """The replies the trainer sees; none of a dropped group, nor with "drop" of one without spread."""
    if not group.kept or (zero_advantage == "drop" and not has_spread(group)):
        return []
    return [
        TrainingSample(
            prompt_ids=group.prompt_ids,
            reply_ids_T=reply.generation.token_ids_T,
            rollout_logprobs_T=reply.generation.logprobs_T,
            versions_T=reply.generation.versions_T,
            advantage=reply.advantage,
        )
        for reply in group.replies_G
        if reply.advantage is not None and reply.generation.token_ids_T
    ]


async def sample_replies(
    task: Task, tree_id: TreeId, count: int, limits: Limits, players: Players
) -> tuple[list[int], list[PolicyTurn]]:
    """The prompt's ids and `count` replies to it. Raises RunError if they cannot be sampled."""
    prompt_ids = players.chat.prompt_ids(task.prompt)
    POSITION.set(RunPosition(tree_id.step))
    turns_G = await ask_policy(
        prompt_ids, count, affinity=task.task_id, name=str(tree_id), limits=limits, players=players
    )
    return prompt_ids, turns_G


async def play_once(task: Task, tree_id: TreeId, *, limits: Limits, players: Players) -> Reply:
    """One whole conversation from the prompt on, for evaluation: one reply, one future.

    Raises RunError if the first reply cannot be sampled.
    """
    prompt_ids, (turn,) = await sample_replies(task, tree_id, 1, limits, players)
    future = await play_future(
        task,
        prompt_ids,
        turn,
        index=0,
        name=f"{tree_id}/0/0",
        sample_index=tree_id.first_sample,
        simulate=True,
        limits=limits,
        players=players,
    )
    return _reply(turn, [future], 1)
