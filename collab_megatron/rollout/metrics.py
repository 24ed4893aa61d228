"""Rollout metrics: pure functions from groups to dashboard figures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from collab_megatron.figures import Figure, Figures
from collab_megatron.rollout.evaluation_tasks import is_opening
from collab_megatron.rollout.rewards import asks_question, clamped_share
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


def score_metrics(futures: Sequence[Future], weights: Mapping[str, float]) -> Figures:
    """Mean and std of every raw metric over the scored futures, and the share of futures with a clamped metric."""
    scored = [
        future for future in futures if future.status.scored and future.scores
    ]  # a penalized future has no scores
    figures: Figures = {}
    for name in weights:
        values = [future.scores[name] for future in scored]
        figures[f"reward/{name}_mean"] = Figure.of("mean", values)
        figures[f"reward/{name}_std"] = Figure.of("std", values)
    figures["reward/clamped_share"] = Figure.ratio(clamped_share(scored, weights) * len(scored), len(scored))
    return figures


def rollout_metrics(groups: Sequence[Group], weights: Mapping[str, float]) -> Figures:
    """The figures of a step's groups. Shares and rates are in [0, 1], lengths in tokens."""
    replies = [(group.task, reply) for group in groups for reply in group.replies_G]
    futures = [future for _, reply in replies for future in reply.futures_K]
    figures = score_metrics(futures, weights)
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
    live = sum(any(r.advantage for r in group.replies_G) for group in groups)
    figures["advantage/groups_with_signal"] = Figure.ratio(live, len(groups))
    figures |= {f"rollout/{name}": value for name, value in clarify_rates(replies).items()}
    lengths = [len(reply.generation.token_ids_T) for _, reply in replies]
    figures["rollout/reply_tokens_mean"] = Figure.of("mean", lengths)
    figures["rollout/reply_tokens_max"] = Figure.of("max", lengths)
    cut = sum(reply.turn.cut for _, reply in replies)
    figures["rollout/cut_share"] = Figure.ratio(cut, len(replies))
    empty = sum(reply.turn.broken and not reply.turn.cut for _, reply in replies)
    figures["rollout/empty_share"] = Figure.ratio(empty, len(replies))
    later = [turn for future in futures for turn in future.turns]
    figures["rollout/later_turns_broken_share"] = Figure.ratio(sum(turn.broken for turn in later), len(later))
    figures["rollout/groups_dropped"] = Figure.of("sum", [sum(not group.kept for group in groups)])
    for status in RolloutStatus:
        count = sum(future.status is status for future in futures)
        figures[f"rollout/futures_{status.value}"] = Figure.of("sum", [count])
    return figures


def _spread_metrics(groups: Sequence[Group]) -> Figures:
    """Variance between the replies of a group (signal) and between the futures of a reply (noise).

    With K futures the noise variance of the MR is futures_var / K. If that is close to replies_var, raise K."""
    stds, between, within = [], [], []
    for group in groups:
        mrs = [reply.mr for reply in group.replies_G if reply.mr is not None]
        if len(mrs) > 1:
            stds.append(statistics.stdev(mrs))
            between.append(statistics.variance(mrs))
        for reply in group.replies_G:
            rewards = [future.reward for future in reply.futures_K if future.reward is not None]
            if len(rewards) > 1:
                within.append(statistics.variance(rewards))
    return {
        "advantage/group_mr_std": Figure.of("mean", stds),
        "advantage/replies_var": Figure.of("mean", between),
        "advantage/futures_var": Figure.of("mean", within),
    }


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
    plays: Sequence[tuple[Task, Reply]], weights: Mapping[str, float], *, apart: bool = False
) -> Figures:
    """Figures of held-out conversations with one future each; failed conversations are counted, not averaged.

    `apart` adds scores, reward and counts of openings and of later turns separately, as openings/NAME and later/NAME.
    Clarify rates are always over openings.
    """
    figures = _score_figures(plays, weights)
    figures |= clarify_rates([(task, reply) for task, reply in plays if reply.mr is not None])
    if apart:
        for kind, opening in (("openings", True), ("later", False)):
            part = [(task, reply) for task, reply in plays if is_opening(task) is opening]
            figures |= {f"{kind}/{name}": figure for name, figure in _score_figures(part, weights).items()}
    return figures


def _score_figures(plays: Sequence[tuple[Task, Reply]], weights: Mapping[str, float]) -> Figures:
    rewards = [reply.mr for _, reply in plays if reply.mr is not None]
    futures = [reply.futures_K[0] for _, reply in plays if reply.mr is not None]
    figures = {name.removeprefix("reward/"): value for name, value in score_metrics(futures, weights).items()}
    for name in weights:
        figures[name] = figures.pop(f"{name}_mean")
    figures["mr"] = Figure.of("mean", rewards)
    figures["conversations"] = Figure.of("sum", [len(plays)])
    figures["conversations_failed"] = Figure.of("sum", [len(plays) - len(rewards)])
    return figures
