"""Rollout group: n replies to one prompt with K futures each, played concurrently, then rewards and advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from collab_megatron.config.sections.algorithms import Baseline, Scale
from collab_megatron.config.sections.rollout import EqualReplies
from collab_megatron.rollout.advantages import group_advantages, overlong_shaping
from collab_megatron.rollout.equal_replies import first_equal, is_uniform
from collab_megatron.rollout.future import Limits, Players, ask_policy, play_future
from collab_megatron.rollout.group_futures import AutoFutures, FuturesRules, play_futures
from collab_megatron.rollout.rewards import multiturn_reward
from collab_megatron.rollout.tree_credit import TreeBaseline, with_turn_advantages
from collab_megatron.run_order import POSITION, RunPosition
from collab_megatron.types import Future, Group, PolicyTurn, Reply, Task, TrainingSample
from collab_megatron.wire.protocol import Tally


@dataclass(frozen=True)
class GroupRules:
    """Size of a group, and when replies or the group are dropped."""

    num_replies: int  # n
    num_futures: int  # K; 0 scores each reply without a future; with `auto` of the first round
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
    equal_replies: EqualReplies = "apart"
    uniform_group_futures: int = 1  # of a group whose replies are all equal, unless they are kept apart
    auto: AutoFutures | None = None
    tree_baseline: TreeBaseline | None = None  # None: only the replies get advantages (algorithm.credit: reply)

    @property
    def uniform_groups_teach(self) -> bool:
        """Whether a group of equal replies, in which none is better than another, teaches anything: its later turns
        differ, or it is compared with other groups."""
        return self.tree_baseline is not None or self.baseline == "batch"

    def shaping(self, turn: PolicyTurn) -> float:
        """What its length adds to the reward of a policy turn; never positive."""
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
    """Play the futures of the replies concurrently; rewards and advantages.

    Waits for the futures, at most `rules.group_timeout_s`. Raises what play_future raises.
    """
    uniform = rules.equal_replies != "apart" and is_uniform(turns_G)
    count = max(rules.num_futures, 1)
    if uniform and not rules.uniform_groups_teach:
        count = min(count, rules.uniform_group_futures)
    group = Group(task=task, prompt_ids=tuple(prompt_ids), replies_G=(), kept=True, name=str(tree_id))
    if not count:
        return _unplayed(group, turns_G)
    futures_G = await play_futures(
        task,
        prompt_ids,
        turns_G,
        tree_id,
        rules=FuturesRules(
            num_futures=rules.num_futures,
            equal_replies="once" if uniform else rules.equal_replies,
            auto=rules.auto,
            timeout_s=rules.group_timeout_s,
        ),
        count=count,
        limits=limits,
        players=players,
    )
    replies = _replies(turns_G, futures_G, rules, least=min(rules.min_futures, count))
    return with_turn_credit(with_advantages(replace(group, replies_G=replies), rules), rules)


def with_turn_credit(group: Group, rules: GroupRules) -> Group:
    """The group with advantages of its later turns, whose futures need their contexts; as it is if only replies get
    them."""
    if rules.tree_baseline is None:
        return group
    return with_turn_advantages(
        group,
        eps=rules.advantage_eps,
        min_std=rules.min_group_std,
        baseline=rules.tree_baseline,
        divides=rules.scale == "group_std",
        shaping=rules.shaping,
    )


def _unplayed(group: Group, turns_G: Sequence[PolicyTurn]) -> Group:
    """A group of equal replies without futures (rollout.uniform_group_futures: 0): none is better than another."""
    return replace(group, replies_G=tuple(Reply(turn, (), advantage=0.0, same_as=0) for turn in turns_G))


def _replies(
    turns_G: Sequence[PolicyTurn], futures_G: Sequence[Sequence[Future]], rules: GroupRules, *, least: int
) -> tuple[Reply, ...]:
    """The replies with their rewards; `least`: scored futures that a reward needs."""
    first_G = first_equal(turns_G) if rules.equal_replies != "apart" else range(len(turns_G))
    replies = []
    for g, (turn, own, first) in enumerate(zip(turns_G, futures_G, first_G, strict=True)):
        counted = own
        if rules.equal_replies == "pool":
            counted = [future for h, futures in enumerate(futures_G) if first_G[h] == first for future in futures]
        reply = _reply(turn, own, least, counted)
        replies.append(reply if first == g else replace(reply, same_as=first))
    return tuple(replies)


def _reply(
    turn: PolicyTurn, futures: Sequence[Future], min_futures: int, counted: Sequence[Future] | None = None
) -> Reply:
    """`counted`: the futures that make the reward, if not its own."""
    counted = futures if counted is None else counted
    enough = sum(future.status.scored for future in counted) >= min_futures
    return Reply(
        turn=turn,
        futures_K=tuple(futures),
        mr=multiturn_reward(counted) if enough else None,
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
    return group.kept and any(
        reply.advantage or any(any(future.advantages) for future in reply.futures_K) for reply in group.replies_G
    )


def with_other_scores(group: Group, futures_G: Sequence[Sequence[Future]], rules: GroupRules) -> Group:
    """The group with these futures of its replies in place of its own: rewards and advantages again. Later turns keep
    no advantages."""
    turns_G = [reply.turn for reply in group.replies_G]
    if turns_G and not any(futures_G):
        return replace(_unplayed(group, turns_G), kept=True)
    rules = replace(rules, equal_replies="once") if rules.equal_replies != "apart" and is_uniform(turns_G) else rules
    least = min(rules.min_futures, max(map(len, futures_G), default=0))
    replies = _replies(turns_G, [[replace(f, advantages=()) for f in own] for own in futures_G], rules, least=least)
    return with_advantages(replace(group, replies_G=replies, kept=True), rules)


def tally(groups: Sequence[Group]) -> Tally:
    """How many groups were dropped, and one of the errors."""
    dropped = [group for group in groups if not group.kept]
    why = [group.error for group in dropped if group.error]
    why += [f.error for group in dropped for reply in group.replies_G for f in reply.futures_K if f.error]
    return Tally(len(groups), len(dropped), why[0] if why else "no future was scored" if dropped else "")


def training_samples(group: Group, zero_advantage: Literal["keep", "drop"]) -> list[TrainingSample]:
    """The policy turns to train on: none of a dropped group, and with "drop" none of a group without spread.

    Every reply with an advantage, then every later turn of its futures with one. Equal replies and copied futures count
    as often as they are there: each stands for what the policy does as often.

    With "drop" and driver.refill_groups, which grows other groups in the place of those, this is dynamic sampling: DAPO
    (Yu et al. 2025, arXiv 2503.14476, eq. 11) fills its batch with groups for which

        0 < number of correct replies < n

    Rewards here are no counts of correct replies, so a group without spread takes the place of one with 0 or n.
    """
    if not group.kept or (zero_advantage == "drop" and not has_spread(group)):
        return []
    replies = [training_sample(group, reply) for reply in group.replies_G if reply.advantage is not None]
    later = [
        _sample(context, turn, advantage, 0.0, group)
        for reply in group.replies_G
        for future in reply.futures_K
        for context, turn, advantage in zip(future.contexts, future.turns, future.advantages, strict=False)
        if advantage is not None
    ]
    return [sample for sample in (*replies, *later) if sample.reply_ids_T]


def training_sample(group: Group, reply: Reply) -> TrainingSample:
    """A reply of the group as the trainer sees it. The reply must have an advantage."""
    assert reply.advantage is not None
    # a group of equal replies may have no reward (rollout.uniform_group_futures: 0): any number that all of them share
    # leaves them equal
    reward = 0.0 if reply.shaped_reward is None else reply.shaped_reward
    return _sample(group.prompt_ids, reply.turn, reply.advantage, reward, group)


def _sample(
    prompt_ids: tuple[int, ...], turn: PolicyTurn, advantage: float, reward: float, group: Group
) -> TrainingSample:
    return TrainingSample(
        prompt_ids=prompt_ids,
        reply_ids_T=turn.generation.token_ids_T,
        rollout_logprobs_T=turn.generation.logprobs_T,
        versions_T=turn.generation.versions_T,
        advantage=advantage,
        reward=reward,
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
