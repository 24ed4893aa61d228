"""First page of an RL run's dashboard: TensorBoard's Custom Scalars tab, and the descriptions of its figures.

docs/operations.md has the same charts as a table, which a test compares with this one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Chart:
    """One chart with some figures as lines."""

    title: str
    figures: tuple[str, ...]  # regular expressions for whole names; figures that a run does not have are left out
    meaning: str
    action: str  # what to do when it looks wrong


CHARTS: Mapping[str, tuple[Chart, ...]] = {
    "Reward": (
        Chart(
            "reward",
            ("reward/mr_mean",),
            "multiturn-aware reward, the mean over the replies of a step",
            "flat from the start: look at groups with signal; sudden jumps: read the best conversations in the viewer",
        ),
        Chart(
            "parts of the reward",
            (r"reward/(?!mr_).+_mean",),
            "each metric before its weight, the mean over the futures of a step",
            "one part rises while the others fall: its weight is too large (`reward.metric_weights`)",
        ),
        Chart(
            "held-out reward",
            ("eval/mr", r"eval/users/[^/]+/mr"),
            "the same reward on held-out tasks, also with each user of `evaluation.users`",
            "falls while the step's reward rises: the policy exploits the users or judges of training",
        ),
    ),
    "Conversations": (
        Chart(
            "how often replies ask",
            (r"rollout/clarify_rate.*", r"eval/clarify_rate_(ambiguous|complete)"),
            "share of replies with a question; where the task says so, apart for unclear and for complete requests",
            "rises for complete requests: more weight for interactivity or for token_amount",
        ),
        Chart(
            "tokens",
            ("rollout/reply_tokens_mean", "hacking/conversation_tokens_mean"),
            "tokens of a reply, and of what the policy wrote in a whole conversation",
            "grows without a higher reward: let token_amount cost more, or set `algorithm.overlong_share`",
        ),
        Chart(
            "how futures end",
            (r"rollout/futures_(terminated|max_turns|truncated|late|timed_out|\w+_failed|unexpected_error)",),
            "futures of a step by their end; terminated: the user said so",
            "many end by max_turns: raise `rollout.max_user_turns`; many are late: raise `driver.future_timeout_s`",
        ),
    ),
    "Learning": (
        Chart(
            "KL, entropy, log-prob gap",
            ("train/kl", "train/entropy", "train/logprob_gap"),
            "KL to the reference; entropy of the policy; log-probs of trainer and engine on the same tokens, in nats",
            "a growing gap: trainer and engine compute differently; entropy near 0: raise `algorithm.entropy_coef`",
        ),
        Chart(
            "gradient",
            ("train/grad_norm", "train/clip_fraction", "advantage/std"),
            "gradient norm before clipping, share of tokens whose ratio is clipped, spread of the advantages",
            "norm grows with every step: lower `optimizer.lr`; clip fraction above 0.3: fewer `algorithm.mini_batches`",
        ),
        Chart(
            "groups with signal",
            ("advantage/groups_with_signal", "rollout/groups_dropped", "rollout/groups_uniform"),
            "groups whose replies got different rewards; groups that were lost or had no spread",
            "few with signal: tasks are too easy or too hard; try `driver.refill_groups`",
        ),
    ),
    "Speed": (
        Chart(
            "seconds by phase",
            (r"time_s/(step|wait_for_rollout|logprobs|update|weight_sync|checkpoint)",),
            "of the trainer's step; wait_for_rollout: it stood still",
            "mostly waiting: more engines, more simulator capacity, or `driver.max_staleness` of 1",
        ),
        Chart(
            "tokens per second",
            ("rollout/tokens_per_s", "train/tokens_per_s"),
            "sampled by all engines, and trained by all ranks while they train",
            "few sampled: more servers (`engine.count`); few trained: see MFU",
        ),
        Chart(
            "MFU",
            ("train/mfu",),
            "share of the GPUs' bf16 peak that the model's FLOPs take while a rank trains; on known GPUs only",
            "below 0.3: larger `train.micro_batch_tokens`, less recomputation, transformer-engine",
        ),
        Chart(
            "staleness and pause",
            ("rollout/staleness_mean", "sync/paused_s"),
            "steps between sampling and training, and seconds in which the engines stood still for a sync",
            "a long pause: see `sync.transport`",
        ),
    ),
    "Cost and health": (
        Chart(
            "dollars",
            ("budget/usd_to_date", "simulator/cost_usd"),
            "of all LLM calls so far, and of a step's",
            "`budget.hard_usd` ends a run before it costs more",
        ),
        Chart(
            "failures by kind",
            (
                r"simulator/[^/]+/(timeouts|rate_limited|server_errors|connection_errors|malformed|failures)",
                r"engine/(lost|retried)",
            ),
            "requests to LLMs that failed and were sent again, calls that failed for good, engines lost",
            "rate_limited: lower `max_concurrency` of that role; malformed: read the replies in the journal",
        ),
        Chart(
            "health of users and judges",
            (r"health/[^/]+_share",),
            "share of replies that leave the role, end early, copy the goal, or cannot be read",
            "above 0.05: read those conversations in the viewer; another model may play better",
        ),
    ),
}


def charts() -> Iterator[Chart]:
    """All, in the order of the page."""
    for group in CHARTS.values():
        yield from group


def layout() -> dict[str, dict[str, list[str | Sequence[str]]]]:
    """For SummaryWriter.add_custom_scalars. TensorBoard matches the beginning of a name, hence the $."""
    return {
        group: {chart.title: ["Multiline", [f"{figure}$" for figure in chart.figures]] for chart in members}
        for group, members in CHARTS.items()
    }


def description(name: str) -> str:
    """Of a figure on the first page, as Markdown; "" for another one."""
    for chart in charts():
        if any(re.fullmatch(figure, name) for figure in chart.figures):
            return f"**{chart.title}**: {chart.meaning}. If it looks wrong: {chart.action}."
    return ""


def table() -> str:
    """The charts as a Markdown table."""
    rows = [f"| {chart.title} | {chart.meaning} | {chart.action} |" for chart in charts()]
    return "\n".join(["| chart | shows | what to do |", "|---|---|---|", *rows]) + "\n"
