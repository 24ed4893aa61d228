"""Progress line on the terminal (and in a Slurm log): steps done, figures, speed, time left."""

from __future__ import annotations

import time
from collections.abc import Mapping

from collab_megatron.text import duration

SMOOTHING = 0.2
"""Weight of the newest step in the running mean of seconds per step."""


class ProgressLine:
    """Prints `step 12/50 | ... | 4.9 s/step | 3m06s left`."""

    def __init__(self, label: str, *, first_step: int, total_steps: int, every: int = 1) -> None:
        self._label = label
        self._total = total_steps
        self._every = every
        self._since = time.monotonic()
        self._step_s: float | None = None
        self._last = first_step

    def step(self, done: int, figures: Mapping[str, str]) -> None:
        """Show `done` finished steps, with `figures` in order as `name value`."""
        if done <= self._last:
            return
        now = time.monotonic()
        seconds = (now - self._since) / (done - self._last)
        self._step_s = seconds if self._step_s is None else (1 - SMOOTHING) * self._step_s + SMOOTHING * seconds
        self._since, self._last = now, done
        if done % self._every and done != self._total:
            return
        shown = " | ".join(f"{name} {value}" for name, value in figures.items())
        left = duration((self._total - done) * self._step_s)
        print(f"{self._label} {done}/{self._total} | {shown} | {self._step_s:.2f} s/step | {left} left", flush=True)

    def pause(self, seconds: float) -> None:
        """Leave `seconds` (an evaluation, a checkpoint) out of the seconds per step."""
        self._since += seconds


def steps_between(total: int, most: int) -> int:
    """Steps between two lines, so that `total` steps have at most `most`: 1, 2, 5, 10, 20, 50, ..."""
    wanted = -(-total // most)
    scale = 1
    while True:
        for digit in (1, 2, 5):
            if digit * scale >= wanted:
                return digit * scale
        scale *= 10
