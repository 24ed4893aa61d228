"""What ruins a run quietly, from a step's figures: told when it begins, not at every step. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

WINDOW = 5
"""Steps over whose mean a figure is judged: one odd step is no news."""


@dataclass(frozen=True)
class Alarm:
    """A figure, the limit that it must not pass, and what to say with the mean in percent."""

    figure: str
    limit: float
    below: bool  # the figure must not fall below the limit; else not rise above it
    sentence: str  # follows the percentage

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
        "of the groups have rewards that differ: the others teach nothing; look for tasks that are too easy or too "
        "hard, raise rollout.num_replies, or set driver.refill_groups",
    ),
    Alarm(
        "system/host_memory_share",
        0.9,
        False,
        "of the machine's memory are in use: lower train.micro_batch_tokens, engine.max_total_tokens or driver.shards",
    ),
    Alarm(
        "system/gpu_memory_share",
        0.95,
        False,
        "of the GPU's memory are in use: lower train.micro_batch_tokens, or set train.recompute",
    ),
)


class Alarms:
    """Those of one run."""

    def __init__(self, alarms: tuple[Alarm, ...] = ALARMS) -> None:
        self._seen = {alarm: deque[float](maxlen=WINDOW) for alarm in alarms}
        self._ringing: set[Alarm] = set()

    def heard(self, done: int, metrics: Mapping[str, float]) -> list[str]:
        """A sentence for every alarm that begins with step `done`; figures that are not there are left alone."""
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
