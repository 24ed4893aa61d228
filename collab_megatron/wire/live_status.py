"""What a driver's live page shows: as JSON between the driver (rollout/live_page.py) and its readers (watch.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from collab_megatron.text import duration


@dataclass(frozen=True)
class Status:
    """One moment of a driver process."""

    run: str
    step: int  # that is made or was last delivered, from 1
    steps: int
    phase: str
    phase_s: float
    trees_running: int
    calls_in_flight: Mapping[str, int]  # by role
    turns_waiting: int  # policy turns without a slot of an engine
    engines_live: int
    engines_lost: Mapping[str, str]  # URL -> reason
    seconds_per_step: float | None  # median of the last steps; None before two
    eta_s: float | None
    usd: float
    calls: int
    figures: Mapping[str, float] = field(default_factory=dict)  # of the last batch
    chat: Sequence[tuple[str, str]] = ()  # role and text: the first future of the last batch's best reply


SHOWN: Mapping[str, str] = {
    "reward": "reward/mr_mean",
    "asks": "rollout/clarify_rate",
    "asks if unclear": "rollout/clarify_rate_ambiguous",
    "asks if clear": "rollout/clarify_rate_complete",
    "tokens of a reply": "rollout/reply_tokens_mean",
    "sampled tokens/s": "rollout/tokens_per_s",
    "groups dropped": "rollout/groups_dropped",
}
"""Row -> figure of the last batch."""


def title_of(status: Status) -> str:
    """`rl: step 12 of 40`."""
    return f"{status.run}: step {status.step} of {status.steps}"


def rows_of(status: Status) -> dict[str, str]:
    """Name -> value, in the order in which they are shown."""
    calls = ", ".join(f"{count} {role}" for role, count in status.calls_in_flight.items() if count) or "none"
    return {
        "phase": f"{status.phase}, for {duration(status.phase_s)}",
        "trees running": str(status.trees_running),
        "calls in flight": calls,
        "policy turns waiting": str(status.turns_waiting),
        "engines": str(status.engines_live),
        "a step": "-" if status.seconds_per_step is None else duration(status.seconds_per_step),
        "left": "-" if status.eta_s is None else duration(status.eta_s),
        "so far": f"{status.calls:,} LLM calls, ${status.usd:.2f}",
        **{row: f"{status.figures[name]:.4g}" for row, name in SHOWN.items() if name in status.figures},
    }
