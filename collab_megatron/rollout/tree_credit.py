"""Tree credit: advantages of the later policy turns of a group's conversations. Pure.

    prompt ── reply a ── user ── turn a1 ── user ── turn a2 ── R*      a conversation is a path to its reward
                     └── user ── turn a3 ── R*
           └─ reply b ...

A turn is identified by its context (all ids before it) and its own ids; conversations that agree in both pass through
the same turn. Its return is the mean R* of the conversations through it. Its advantage is

    (return - baseline) / (std of R* over the group's conversations + advantage_eps)

and 0 where that std is below min_group_std. With another algorithm.scale it is not divided here. With overlong shaping
R* counts, in the comparison of a conversation's turn j with others, with what the length of its own turn j adds, as the
reward of a reply does. Baselines never contain the conversations through the turn itself, so they
do not depend on it and leave the policy gradient unbiased:

- group: the mean over the group's other conversations, as for the replies (the paper's group)
- siblings: an estimate of the value of the turn's own context. It starts from that mean and takes in, from the root to
  the turn, the conversations through the same reply, then through each earlier context. A level with N other
  conversations of mean m moves the estimate b to (N m + b) / (N + 1): one pseudo-observation of the level above
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from collab_megatron.rollout.equal_replies import first_equal
from collab_megatron.types import Future, Group, PolicyTurn

TreeBaseline = Literal["siblings", "group"]
Ids = tuple[int, ...]
Turn = tuple[Ids, Ids]
"""(context, own ids)."""


@dataclass(frozen=True)
class _Conversation:
    """A scored future."""

    reply: int  # the first reply of the group with these ids
    turns: tuple[Turn, ...]
    reward: float
    shaping: tuple[float, ...] = ()  # of each turn, what its length adds; empty: nothing

    def reward_at(self, turn: int) -> float:
        """The reward in the comparison of turns of this index."""
        return self.reward + (self.shaping[turn] if turn < len(self.shaping) else 0.0)


def with_turn_advantages(
    group: Group,
    *,
    eps: float,
    min_std: float,
    baseline: TreeBaseline,
    divides: bool = True,
    shaping: Callable[[PolicyTurn], float] = lambda turn: 0.0,
) -> Group:
    """The group whose scored futures have an advantage for every policy turn; a dropped group as it is.

    Futures need their `contexts`. Copied futures have the advantages of those that were played. divides: by the std.
    shaping: what its length adds to the reward of a turn.
    """
    if not group.kept:
        return group
    first_G = first_equal([reply.turn for reply in group.replies_G])
    conversations = [
        _Conversation(first_G[g], _turns(future), future.reward, tuple(map(shaping, future.turns)))
        for g, reply in enumerate(group.replies_G)
        if reply.advantage is not None
        for future in reply.futures_K
        if future.reward is not None and not future.copied
    ]
    advantages = turn_advantages(conversations, eps=eps, min_std=min_std, baseline=baseline, divides=divides)
    replies = tuple(
        reply
        if reply.advantage is None
        else replace(reply, futures_K=tuple(_credited(future, advantages) for future in reply.futures_K))
        for reply in group.replies_G
    )
    return replace(group, replies_G=replies)


def turn_advantages(
    conversations: Sequence[_Conversation],
    *,
    eps: float,
    min_std: float,
    baseline: TreeBaseline,
    divides: bool = True,
) -> dict[Turn, float]:
    """The advantage of every distinct turn."""
    through: dict[Turn, set[int]] = {}
    index_of: dict[Turn, int] = {}  # among its conversation's turns
    for number, conversation in enumerate(conversations):
        for j, turn in enumerate(conversation.turns):
            through.setdefault(turn, set()).add(number)
            index_of[turn] = j
    most = max(index_of.values(), default=-1) + 1
    rewards_J = [[conversation.reward_at(j) for conversation in conversations] for j in range(most)]
    stds_J = [statistics.stdev(rewards) if len(rewards) > 1 else 0.0 for rewards in rewards_J]
    levels = _levels(conversations)
    found = {}
    for turn, members in through.items():
        rewards, std = rewards_J[index_of[turn]], stds_J[index_of[turn]]
        value = statistics.fmean(rewards[i] for i in members)
        path = levels[next(iter(members)), turn] if baseline == "siblings" else ()
        difference = value - _baseline(rewards, members, path, value)
        found[turn] = 0.0 if std < min_std else difference / (std + eps if divides else 1.0)
    return found


def _levels(conversations: Sequence[_Conversation]) -> Mapping[tuple[int, Turn], Sequence[set[int]]]:
    """(conversation, one of its turns) -> the conversations through its reply, then through each context up to it."""
    replies: dict[int, set[int]] = {}
    contexts: dict[Ids, set[int]] = {}
    for number, conversation in enumerate(conversations):
        replies.setdefault(conversation.reply, set()).add(number)
        for context, _ in conversation.turns:
            contexts.setdefault(context, set()).add(number)
    return {
        (number, turn): [
            replies[conversation.reply],
            *(contexts[context] for context, _ in conversation.turns[: j + 1]),
        ]
        for number, conversation in enumerate(conversations)
        for j, turn in enumerate(conversation.turns)
    }


def _baseline(rewards: Sequence[float], members: set[int], path: Sequence[set[int]], alone: float) -> float:
    """`alone`: the result if there are no other conversations."""
    others = [reward for i, reward in enumerate(rewards) if i not in members]
    estimate = statistics.fmean(others) if others else alone
    for level in path:
        rest = [rewards[i] for i in level - members]
        estimate = (sum(rest) + estimate) / (len(rest) + 1)
    return estimate


def _turns(future: Future) -> tuple[Turn, ...]:
    return tuple(
        (context, turn.generation.token_ids_T) for context, turn in zip(future.contexts, future.turns, strict=True)
    )


def _credited(future: Future, advantages: Mapping[Turn, float]) -> Future:
    if future.reward is None:
        return future
    return replace(future, advantages=tuple(advantages.get(turn) for turn in _turns(future)))
