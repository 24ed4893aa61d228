"""Alarms about figures that ruin a run without an error: one warning when a figure passes its limit. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

WINDOW = 5
"""A figure is compared as its mean over this many steps: one outlier gives no alarm."""


@dataclass(frozen=True)
class Alarm:
    """A figure, its limit, and the warning."""

    figure: str
    limit: float
    below: bool  # the limit is a minimum; else a maximum
    sentence: str  # follows the mean as a percentage

    def rings(self, mean: float) -> bool:
        return mean < self.limit if self.below else mean > self.limit


ALARMS = (
    Alarm(
        "rollout/cut_share",
        0.5,
        False,
        "of the replies are cut at the token limit: raise rollout.max_new_tokens, or look at the conversations for "
        "replies that do not end",
    ),
    Alarm(
        "advantage/groups_with_signal",
        0.5,
        True,
        "of the groups have rewards that differ, and only these teach anything: look for tasks that are too easy or "
        "too hard, raise rollout.num_replies, or set driver.refill_groups",
    ),
    Alarm(
        "advantage/noise_share",
        0.8,
        False,
        "of the difference between replies is noise of the simulators: raise rollout.num_repeat_rollouts, or set it to "
        "auto",
    ),
    Alarm(
        "hacking/reply_length_ratio",
        2.0,
        False,
        "of the first steps' length is the length of the replies now: if they say no more than before, raise the "
        "weight of token_amount",
    ),
    Alarm(
        "system/host_memory_share",
        0.9,
        False,
        "of the machine's memory is in use: lower train.micro_batch_tokens, engine.max_total_tokens or driver.shards",
    ),
    Alarm(
        "system/gpu_memory_share",
        0.95,
        False,
        "of the GPU's memory is in use: lower train.micro_batch_tokens, or set train.recompute",
    ),
)


class Alarms:
    """The alarms of one run."""

    def __init__(self) -> None:
        self._seen = {alarm: deque[float](maxlen=WINDOW) for alarm in ALARMS}
        self._ringing: set[Alarm] = set()

    def check(self, done: int, metrics: Mapping[str, float]) -> list[str]:
        """A warning for every alarm that begins at step `done`. A step without the figure changes nothing."""
        sentences = []
        for alarm, values in self._seen.items():
            if alarm.figure not in metrics:
                continue
            values.append(metrics[alarm.figure])
            mean = sum(values) / len(values)
            if not alarm.rings(mean):
                self._ringing.discard(alarm)
            elif alarm not in self._ringing:
                self._ringing.add(alarm)
                steps = f"steps {done - len(values) + 1} to {done}" if len(values) > 1 else f"step {done}"
                only = "only " if alarm.below else ""
                sentences.append(f"{steps}: {only}{mean:.0%} {alarm.sentence}")
        return sentences
