"""Rollout group: n replies to one prompt with K futures each, played concurrently, then rewards and advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from collab_megatron.concurrency import run_all
from collab_megatron.config.sections.algorithms import Baseline, Scale
from collab_megatron.rollout.advantages import group_advantages, overlong_shaping
from collab_megatron.rollout.future import Limits, Players, ask_policy, play_future
from collab_megatron.rollout.rewards import multiturn_reward
from collab_megatron.run_order import POSITION, RunPosition
from collab_megatron.types import Future, Group, PolicyTurn, Reply, RolloutStatus, Task, TrainingSample
from collab_megatron.wire.protocol import Tally


@dataclass(frozen=True)
class GroupRules:
    """Size of a group, and when replies or the group are dropped."""

    num_replies: int  # n
    num_futures: int  # K; 0 scores each reply without a future
    min_replies: int  # with fewer scored replies the group is dropped
    min_futures: int  # with fewer scored futures the reply leaves its group
    group_timeout_s: float  # starts when the replies are sampled; then the group is complete without its late futures
    advantage_eps: float
    min_group_std: float
    baseline: Baseline = "group"
    scale: Scale = "group_std"
    overlong_share: float = 0.0  # of `longest`, in which a reply loses reward
    overlong_penalty: float = 1.0
    longest: int = 1  # tokens that a reply may have

    def shaping(self, turn: PolicyTurn) -> float:
        """What its length adds to the reward of a reply; never positive."""
        return overlong_shaping(
            turn.num_tokens, longest=self.longest, share=self.overlong_share, penalty=self.overlong_penalty
        )


@dataclass(frozen=True)
class TreeId:
    """Identity of a tree in the run."""

    step: int  # training step for which it is started
    slot: int  # index among the prompts of that step
    name: str = ""  # unique in the run; empty: STEP/SLOT
    first_sample: int = 0  # sample index of its first future; the others follow

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
    """Play every future of every reply concurrently.

    A broken reply (`limits.cut_reply`) has K equal futures: one is scored, and all K get its scores, so that counts and
    `min_futures` keep their meaning.

    Waits for all futures, at most `rules.group_timeout_s`; unfinished futures are cancelled and get the status LATE.
    Raises what play_future raises.
    """
    count = max(rules.num_futures, 1)
    played = [(g, k) for g, turn in enumerate(turns_G) for k in range(1 if limits.breaks_off(turn) else count)]
    late = f"its group reached its deadline of {rules.group_timeout_s:g} s"
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
        Group(task=task, prompt_ids=tuple(prompt_ids), replies_G=replies, kept=True, name=str(tree_id)), rules
    )


def _reply(turn: PolicyTurn, futures: Sequence[Future], min_futures: int) -> Reply:
    enough = sum(future.status.scored for future in futures) >= min_futures
    return Reply(
        turn=turn,
        futures_K=tuple(futures),
        mr=multiturn_reward(futures) if enough else None,
    )


def with_advantages(group: Group, rules: GroupRules) -> Group:
    """The group with advantages over the replies with a reward; dropped if there are fewer than `min_replies` of them.

    A missing reward is not a zero: such a reply leaves the group and does not lower the mean.
    """
    shaped = [
        None if reply.mr is None else reply.mr + rules.shaping(reply.turn) for reply in group.replies_G
    ]  # what the advantages compare
    scored = [reward for reward in shaped if reward is not None]
    if len(scored) < max(rules.min_replies, 2):
        return replace(group, kept=False)
    advantages = iter(
        group_advantages(
            scored,
            eps=rules.advantage_eps,
            min_std=rules.min_group_std,
            baseline=rules.baseline,
            scale=rules.scale,
        )
    )
    replies = tuple(
        reply if reward is None else replace(reply, shaped_reward=reward, advantage=next(advantages))
        for reply, reward in zip(group.replies_G, shaped, strict=True)
    )
    return replace(group, replies_G=replies)


def has_spread(group: Group) -> bool:
    """Whether the group has a learning signal: it is kept, and not all advantages are 0."""
    return group.kept and any(reply.advantage for reply in group.replies_G)


def tally(groups: Sequence[Group]) -> Tally:
    """How many groups were dropped, and one of the errors."""
    dropped = [group for group in groups if not group.kept]
    why = [group.error for group in dropped if group.error]
    why += [f.error for group in dropped for reply in group.replies_G for f in reply.futures_K if f.error]
    return Tally(len(groups), len(dropped), why[0] if why else "no future was scored" if dropped else "")


def training_samples(group: Group, zero_advantage: Literal["keep", "drop"]) -> list[TrainingSample]:
    """The replies to train on: none of a dropped group, and with "drop" none of a group without spread."""
    if not group.kept or (zero_advantage == "drop" and not has_spread(group)):
        return []
    return [
        training_sample(group, reply)
        for reply in group.replies_G
        if reply.advantage is not None and reply.shaped_reward is not None and reply.generation.token_ids_T
    ]


def training_sample(group: Group, reply: Reply) -> TrainingSample:
    """A reply of the group as the trainer sees it. The reply must have an advantage."""
    assert reply.advantage is not None
    assert reply.shaped_reward is not None
    return TrainingSample(
        prompt_ids=group.prompt_ids,
        reply_ids_T=reply.generation.token_ids_T,
        rollout_logprobs_T=reply.generation.logprobs_T,
        versions_T=reply.generation.versions_T,
        advantage=reply.advantage,
        reward=reply.shaped_reward,
        group=group.name,
    )


async def sample_replies(
    task: Task, tree_id: TreeId, count: int, limits: Limits, players: Players
) -> tuple[list[int], list[PolicyTurn]]:
    """The ids of the prompt and `count` replies. Waits for the engine. Raises RunError if it does not answer."""
    prompt_ids = players.chat.prompt_ids(task.prompt)
    POSITION.set(RunPosition(tree_id.step))
    turns_G = await ask_policy(
        prompt_ids, count, affinity=task.task_id, name=str(tree_id), limits=limits, players=players
    )
    return prompt_ids, turns_G


async def play_once(task: Task, tree_id: TreeId, *, limits: Limits, players: Players) -> Reply:
    """One whole conversation from the prompt on, for evaluation: one reply, one future.

    Waits for engine, user and judges. Raises RunError if the first reply cannot be sampled.
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
