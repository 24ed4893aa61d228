"""The dashboard's view of a step's trees: pure functions from groups to named numbers."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from collab_megatron.rewards import asks_question, clamped_share
from collab_megatron.types import Future, Group, Reply, RolloutStatus, Task


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _put(metrics: dict[str, float], name: str, value: float | None) -> None:
    """A figure that nothing was measured for is left out, not written as zero."""
    if value is not None:
        metrics[name] = value


def clarify_rates(pairs: Iterable[tuple[Task, Reply]]) -> dict[str, float]:
    """Share of replies to an opening that ask: over all openings, the ambiguous and the complete ones.

    Histories with an answered question are left out: what was missing at the opening is there by then.
    """
    asked: dict[str, list[float]] = {"clarify_rate": [], "clarify_rate_ambiguous": [], "clarify_rate_complete": []}
    for task, reply in pairs:
        if sum(message.role == "user" for message in task.prompt) > 1:
            continue
        asks = float(asks_question(reply.text))
        asked["clarify_rate"].append(asks)
        if task.ambiguous is not None:
            asked["clarify_rate_ambiguous" if task.ambiguous else "clarify_rate_complete"].append(asks)
    return {name: statistics.fmean(values) for name, values in asked.items() if values}


def score_metrics(futures: Sequence[Future], weights: Mapping[str, float]) -> dict[str, float]:
    """Mean and spread of every raw metric over the scored futures, and how often a weighted one sits at the clamp."""
    scored = [future for future in futures if future.status.scored]
    metrics: dict[str, float] = {}
    for name in weights:
        values = [future.scores[name] for future in scored]
        _put(metrics, f"reward/{name}_mean", _mean(values))
        if len(values) > 1:
            metrics[f"reward/{name}_std"] = statistics.stdev(values)
    if scored:
        metrics["reward/clamped_share"] = clamped_share(scored, weights)
    return metrics


def rollout_metrics(groups: Sequence[Group], weights: Mapping[str, float]) -> dict[str, float]:
    """Everything the driver knows of a step, by dashboard name. Rates are shares of 1, lengths are tokens."""
    replies = [(group.task, reply) for group in groups for reply in group.replies_G]
    futures = [future for _, reply in replies for future in reply.futures_K]
    metrics = score_metrics(futures, weights)
    mrs = [reply.mr for _, reply in replies if reply.mr is not None]
    _put(metrics, "reward/mr_mean", _mean(mrs))
    if len(mrs) > 1:
        metrics["reward/mr_std"] = statistics.stdev(mrs)
    spreads = [
        statistics.stdev(r.mr for r in g.replies_G if r.mr is not None)
        for g in groups
        if sum(r.mr is not None for r in g.replies_G) > 1
    ]
    _put(metrics, "advantage/group_mr_std", _mean(spreads))
    advantages = [reply.advantage for _, reply in replies if reply.advantage is not None]
    if len(advantages) > 1:
        metrics["advantage/std"] = statistics.stdev(advantages)
        metrics["advantage/max"] = max(advantages)
        metrics["advantage/min"] = min(advantages)
        live = sum(any(r.advantage for r in group.replies_G) for group in groups)
        metrics["advantage/groups_with_signal"] = live / len(groups)
    metrics |= {f"rollout/{name}": value for name, value in clarify_rates(replies).items()}
    lengths = [len(reply.generation.token_ids_T) for _, reply in replies]
    _put(metrics, "rollout/reply_tokens_mean", _mean(lengths))
    if lengths:
        metrics["rollout/reply_tokens_max"] = max(lengths)
        metrics["rollout/cut_share"] = sum(r.generation.finish_reason == "length" for _, r in replies) / len(replies)
    metrics["rollout/groups_dropped"] = sum(not group.kept for group in groups)
    for status in RolloutStatus:
        metrics[f"rollout/futures_{status.value}"] = sum(future.status is status for future in futures)
    return metrics


def evaluation_metrics(plays: Sequence[tuple[Task, Reply]], weights: Mapping[str, float]) -> dict[str, float]:
    """Figures of held-out conversations, each with one future; failed conversations are counted, not averaged."""
    scored = [(task, reply) for task, reply in plays if reply.mr is not None]
    futures = [reply.futures_K[0] for _, reply in scored]
    metrics = {name.removeprefix("reward/"): value for name, value in score_metrics(futures, weights).items()}
    for name in weights:
        if f"{name}_mean" in metrics:
            metrics[name] = metrics.pop(f"{name}_mean")
    _put(metrics, "mr", _mean([reply.mr for _, reply in scored if reply.mr is not None]))
    metrics |= clarify_rates(scored)
    metrics["conversations"] = len(plays)
    metrics["conversations_failed"] = len(plays) - len(scored)
    return metrics
