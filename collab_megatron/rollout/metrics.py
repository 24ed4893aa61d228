"""Rollout metrics: pure functions from groups to dashboard figures."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from collab_megatron.figures import Figure, Figures
from collab_megatron.rollout.equal_replies import first_equal, is_uniform
from collab_megatron.rollout.evaluation_tasks import is_opening
from collab_megatron.rollout.group import has_spread
from collab_megatron.rollout.rewards import asks_question, clamped_shares
from collab_megatron.rollout.rewards.aggregate import DEFAULT_CLAMPS, Clamps
from collab_megatron.rollout.rewards.noise import noise_variance
from collab_megatron.types import Future, Group, Reply, RolloutStatus, Task


def clarify_rates(pairs: Iterable[tuple[Task, Reply]]) -> Figures:
    """Share of replies to an opening that ask a question: over all openings, ambiguous ones, complete ones.

    Later turns are left out: by then the user may have given what was missing.
    """
    asked: dict[str, list[float]] = {"clarify_rate": [], "clarify_rate_ambiguous": [], "clarify_rate_complete": []}
    for task, reply in pairs:
        if not is_opening(task):
            continue
        asks = float(asks_question(reply.text))
        asked["clarify_rate"].append(asks)
        if task.ambiguous is not None:
            asked["clarify_rate_ambiguous" if task.ambiguous else "clarify_rate_complete"].append(asks)
    return {name: Figure.of("mean", values) for name, values in asked.items()}


def score_metrics(futures: Sequence[Future], weights: Mapping[str, float], clamps: Clamps) -> Figures:
    """Mean and std of every raw metric over the scored futures, and the share of futures in which it is clamped."""
    scored = [
        future for future in futures if future.status.scored and future.scores
    ]  # a penalized future has no scores
    figures: Figures = {}
    for name in weights:
        values = [future.scores[name] for future in scored]
        figures[f"reward/{name}_mean"] = Figure.of("mean", values)
        figures[f"reward/{name}_std"] = Figure.of("std", values)
    for name, share in clamped_shares(scored, weights, clamps).items():
        figure = f"reward/{name}_clamped_share" if name else "reward/clamped_share"
        figures[figure] = Figure.ratio(share * len(scored), len(scored))
    return figures


def rollout_metrics(groups: Sequence[Group], weights: Mapping[str, float], clamps: Clamps = DEFAULT_CLAMPS) -> Figures:
    """The figures of a step's groups. Shares and rates are in [0, 1], lengths in tokens."""
    replies = [(group.task, reply) for group in groups for reply in group.replies_G]
    futures = [future for _, reply in replies for future in reply.futures_K]
    figures = score_metrics(futures, weights, clamps)
    mrs = [reply.mr for _, reply in replies if reply.mr is not None]
    figures["reward/mr_mean"] = Figure.of("mean", mrs)
    figures["reward/mr_std"] = Figure.of("std", mrs)
    shaping = [r.shaped_reward - r.mr for _, r in replies if r.shaped_reward is not None and r.mr is not None]
    figures["reward/overlong_mean"] = Figure.of("mean", shaping)
    figures |= _spread_metrics(groups)
    advantages = [reply.advantage for _, reply in replies if reply.advantage is not None]
    figures["advantage/std"] = Figure.of("std", advantages)
    figures["advantage/max"] = Figure.of("max", advantages)
    figures["advantage/min"] = Figure.of("min", advantages)
    figures["advantage/groups_with_signal"] = Figure.ratio(sum(map(has_spread, groups)), len(groups))
    later = [a for _, reply in replies for f in reply.futures_K if not f.copied for a in f.advantages if a is not None]
    if later:  # algorithm.credit: tree
        figures["advantage/later_turns_std"] = Figure.of("std", later)
    figures |= {f"rollout/{name}": value for name, value in clarify_rates(replies).items()}
    lengths = [len(reply.generation.token_ids_T) for _, reply in replies]
    figures["rollout/reply_tokens_mean"] = Figure.of("mean", lengths)
    figures["rollout/reply_tokens_max"] = Figure.of("max", lengths)
    cut = sum(reply.turn.cut for _, reply in replies)
    figures["rollout/cut_share"] = Figure.ratio(cut, len(replies))
    empty = sum(reply.turn.broken and not reply.turn.cut for _, reply in replies)
    figures["rollout/empty_share"] = Figure.ratio(empty, len(replies))
    turns = [turn for future in futures for turn in future.turns]
    figures["rollout/later_turns_broken_share"] = Figure.ratio(sum(turn.broken for turn in turns), len(turns))
    figures["rollout/groups_dropped"] = Figure.of("sum", [sum(not group.kept for group in groups)])
    figures |= _equal_metrics(groups)
    for status in RolloutStatus:
        count = sum(future.status is status for future in futures)
        figures[f"rollout/futures_{status.value}"] = Figure.of("sum", [count])
    return figures


def _equal_metrics(groups: Sequence[Group]) -> Figures:
    """Share of replies that no earlier reply of their group equals; groups of one distinct reply; futures played."""
    turns = [[reply.turn for reply in group.replies_G] for group in groups]
    distinct = sum(first == g for turns_G in turns for g, first in enumerate(first_equal(turns_G)))
    played = [sum(not f.copied for reply in group.replies_G for f in reply.futures_K) for group in groups]
    return {
        "rollout/distinct_share": Figure.ratio(distinct, sum(map(len, turns))),
        "rollout/groups_uniform": Figure.of("sum", [sum(map(is_uniform, turns))]),
        "rollout/futures_played": Figure.of("sum", [sum(played)]),
    }


def _spread_metrics(groups: Sequence[Group]) -> Figures:
    """Variance of MR between the replies of a group, of R* between the futures of a reply, and the share of the former
    that the latter explains: noise, on which advantages are wasted."""
    stds, between, within = [], [], []
    noise = spread = 0.0
    for group in groups:
        mrs = [reply.mr for reply in group.replies_G if reply.mr is not None]
        rewards_C, copies_C = _estimates(group)
        within += [statistics.variance(rewards) for rewards in rewards_C if len(rewards) > 1]
        if len(mrs) < 2:
            continue
        stds.append(statistics.stdev(mrs))
        between.append(statistics.variance(mrs))
        known = noise_variance(rewards_C, copies_C)
        if known is not None:
            noise += min(known, between[-1])
            spread += between[-1]
    return {
        "advantage/group_mr_std": Figure.of("mean", stds),
        "advantage/replies_var": Figure.of("mean", between),
        "advantage/futures_var": Figure.of("mean", within),
        "advantage/noise_share": Figure.ratio(noise, spread),
    }


def _estimates(group: Group) -> tuple[list[list[float]], list[int]]:
    """For each reply with a reward of its own: the rewards of the futures behind it, and the replies that share it."""
    rewards: dict[int, list[float]] = {}
    copies: Counter[int] = Counter()
    for g, reply in enumerate(group.replies_G):
        if reply.mr is not None:
            first = g if reply.same_as is None else reply.same_as
            copies[first] += 1
            own = [f.reward for f in reply.futures_K if f.reward is not None and not f.copied]
            rewards.setdefault(first, []).extend(own)
    return list(rewards.values()), [copies[first] for first in rewards]


def staleness_metrics(groups: Sequence[Group], step: int) -> Figures:
    """By how many updates the live weights are newer than the weights that sampled each token; 0 is on-policy."""
    behind = [
        step - version
        for group in groups
        if group.kept
        for reply in group.replies_G
        for version in reply.generation.versions_T
    ]
    return {
        "rollout/staleness_mean": Figure.of("mean", behind),
        "rollout/staleness_max": Figure.of("max", behind),
    }


def evaluation_metrics(
    plays: Sequence[tuple[Task, Reply]],
    weights: Mapping[str, float],
    clamps: Clamps = DEFAULT_CLAMPS,
    *,
    apart: bool = False,
) -> Figures:
    """Figures of held-out conversations with one future each; failed conversations are counted, not averaged.

    `apart` adds scores, reward and counts of openings and of later turns separately, as openings/NAME and later/NAME.
    Clarify rates are always over openings.
    """
    figures = _score_figures(plays, weights, clamps)
    figures |= clarify_rates([(task, reply) for task, reply in plays if reply.mr is not None])
    if apart:
        for kind, opening in (("openings", True), ("later", False)):
            part = [(task, reply) for task, reply in plays if is_opening(task) is opening]
            figures |= {f"{kind}/{name}": figure for name, figure in _score_figures(part, weights, clamps).items()}
    return figures


def _score_figures(plays: Sequence[tuple[Task, Reply]], weights: Mapping[str, float], clamps: Clamps) -> Figures:
    rewards = [reply.mr for _, reply in plays if reply.mr is not None]
    futures = [reply.futures_K[0] for _, reply in plays if reply.mr is not None]
    scored = score_metrics(futures, weights, clamps)
    figures = {name.removeprefix("reward/"): value for name, value in scored.items()}
    for name in weights:
        figures[name] = figures.pop(f"{name}_mean")
    figures["mr"] = Figure.of("mean", rewards)
    figures["conversations"] = Figure.of("sum", [len(plays)])
    figures["conversations_failed"] = Figure.of("sum", [len(plays) - len(rewards)])
    return figures
