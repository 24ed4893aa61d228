"""Length drift: how long replies and conversations are now, compared with the first steps of the run. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping

FIRST_STEPS = 5
LENGTHS = {
    "hacking/reply_length_ratio": "rollout/reply_tokens_mean",
    "hacking/conversation_length_ratio": "hacking/conversation_tokens_mean",
}
"""Figure -> the length behind it."""


class LengthDrift:
    """The lengths of the first steps, also of those that an earlier attempt of the run has done."""

    def __init__(self, rows: Iterable[Mapping[str, float]]) -> None:
        """rows: lines of metrics.jsonl."""
        self._first: dict[str, dict[int, float]] = {name: {} for name in LENGTHS}
        for row in rows:
            self._note(int(row["step"]), row)

    def figures(self, done: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """The ratios after step `done`, which counts from 1; 1 is no drift. None before the first steps are done."""
        self._note(done, metrics)
        return {
            name: metrics[length] / statistics.fmean(self._first[name].values())
            for name, length in LENGTHS.items()
            if length in metrics and len(self._first[name]) == FIRST_STEPS and any(self._first[name].values())
        }

    def _note(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, length in LENGTHS.items():
            if 1 <= step <= FIRST_STEPS and length in metrics:
                self._first[name][step] = metrics[length]
