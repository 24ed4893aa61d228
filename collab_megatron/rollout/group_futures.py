"""The futures of a group: which are played, which replies share them, and more of them where they decide something.

    equal_replies   once: replies a a b with K = 2 play a0 a1 b0 b1, and the second a gets copies of a0 a1
                    pool, apart: each reply plays its own
    auto            two futures of each reply, then rounds of one more for undecided replies (rewards/noise.py)

Names and sample indices of futures depend on reply and future alone, so a resume finds in the journal what was played,
in whatever order.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Protocol

from collab_megatron.concurrency import run_all
from collab_megatron.config.sections.rollout import EqualReplies
from collab_megatron.rollout.equal_replies import first_equal
from collab_megatron.rollout.first_turns import FirstTurns
from collab_megatron.rollout.future import Limits, Players, play_future
from collab_megatron.rollout.rewards.noise import undecided
from collab_megatron.types import Future, PolicyTurn, RolloutStatus, Task

Place = tuple[int, int]
"""(index of the reply, index of the future)."""


@dataclass(frozen=True)
class AutoFutures:
    """Bounds of `num_repeat_rollouts: auto`."""

    most: int  # futures of one reply
    tree: int  # futures of a tree, in all rounds


@dataclass(frozen=True)
class FuturesRules:
    """How many futures, and which replies share them."""

    num_futures: int  # K; 0 scores each reply without a future; with `auto` of the first round
    equal_replies: EqualReplies
    auto: AutoFutures | None
    timeout_s: float  # of all rounds; then the futures that are not done are late

    @property
    def most(self) -> int:
        """The most futures of one reply, and the distance of sample indices between replies."""
        return self.auto.most if self.auto else max(self.num_futures, 1)


class Tree(Protocol):
    """Identity of a tree (group.TreeId)."""

    @property
    def first_sample(self) -> int: ...


async def play_futures(
    task: Task,
    prompt_ids: Sequence[int],
    turns_G: Sequence[PolicyTurn],
    tree_id: Tree,
    *,
    rules: FuturesRules,
    count: int,
    limits: Limits,
    players: Players,
) -> list[list[Future]]:
    """The futures of each reply: `count` in the first round, and copies of those that it shares.

    A broken reply (`limits.cut_reply`) has equal futures: one is scored, and the others are its copies, so that counts
    and `min_futures` keep their meaning. Waits for all futures, at most `rules.timeout_s`; unfinished ones are
    cancelled and get the status LATE. Raises what play_future raises.
    """
    deadline = time.monotonic() + rules.timeout_s
    first_G = first_equal(turns_G)
    source_G = first_G if rules.equal_replies == "once" else list(range(len(turns_G)))
    sources = sorted(set(source_G))
    single = {g for g in sources if limits.breaks_off(turns_G[g])}
    played: dict[Place, Future] = {}

    async def play(places: Sequence[Place], users: Mapping[int, Players]) -> None:
        late = f"its group reached its deadline of {rules.timeout_s:g} s"
        futures = await run_all(
            (
                play_future(
                    task,
                    prompt_ids,
                    turns_G[g],
                    index=k,
                    name=f"{tree_id}/{g}/{k}",
                    sample_index=sample_index(g, k),
                    simulate=rules.num_futures > 0,
                    limits=limits,
                    players=users.get(g, players),
                )
                for g, k in places
            ),
            timeout_s=max(0.0, deadline - time.monotonic()),
            late=lambda number: Future(places[number][1], RolloutStatus.LATE, (), error=late),
        )
        played.update(zip(places, futures, strict=True))

    def sample_index(g: int, k: int) -> int:
        return tree_id.first_sample + g * rules.most + k

    async with AsyncExitStack() as closing:
        users: dict[int, Players] = {}
        if players.together is not None and rules.num_futures > 0:
            for g in sources:
                if g not in single and count > 1:
                    turns = FirstTurns(players.user, players.together, [sample_index(g, k) for k in range(count)])
                    closing.push_async_callback(turns.close)
                    users[g] = replace(players, user=turns)
        await play([(g, k) for g in sources for k in range(1 if g in single else count)], users)
    while rules.auto is not None and time.monotonic() < deadline:
        classes = _classes(first_G if rules.equal_replies != "apart" else source_G, sources)
        more = _more(classes, played, rules.auto, single)
        if not more:
            break
        await play(more, {})
    return [_futures_of(g, source, played, count if source in single else 0) for g, source in enumerate(source_G)]


def _classes(first_G: Sequence[int], sources: Sequence[int]) -> list[list[int]]:
    """The replies that play futures, those with one expected reward together."""
    classes: dict[int, list[int]] = {}
    for g in sources:
        classes.setdefault(first_G[g], []).append(g)
    return list(classes.values())


def _more(
    classes: Sequence[Sequence[int]], played: Mapping[Place, Future], auto: AutoFutures, single: set[int]
) -> list[Place]:
    """The futures of the next round: one for each undecided class, while the tree's bound has room."""
    counts = {g: sum(reply == g for reply, _ in played) for members in classes for g in members}
    rewards_C = [
        [future.reward for (g, _), future in played.items() if g in members and future.reward is not None]
        for members in classes
    ]
    places: list[Place] = []
    for c in undecided(rewards_C):
        g = min(classes[c], key=lambda member: counts[member])
        if g not in single and counts[g] < auto.most and len(played) + len(places) < auto.tree:
            places.append((g, counts[g]))
    return places


def _futures_of(g: int, source: int, played: Mapping[Place, Future], copies: int) -> list[Future]:
    """The futures of reply `g`, which shares those of reply `source`. `copies`: of a broken reply's one future."""
    own = [played[place] for place in sorted(played) if place[0] == source]
    own += [replace(own[0], index=k, calls=(), copied=True) for k in range(1, copies)]
    return own if g == source else [replace(future, calls=(), copied=True) for future in own]
