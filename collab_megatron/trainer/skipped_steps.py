"""Counter of optimizer steps that were skipped because their gradient was not finite; too many in a row end the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from collab_megatron.errors import GradientsNotFinite
from collab_megatron.trainer.actor.actor import StepResult

GAPS = {
    "log_ratio_max": "the policy and itself at the start of the step",
    "ref_gap_max": "the policy and its reference",
    "logprob_gap_max": "trainer and engine",
}
"""Largest differences of log-probs in StepResult.largest, and what they are between."""


class SkippedSteps:
    """Counts over the whole attempt. Equal on every rank, because a StepResult is."""

    def __init__(self, limit: int) -> None:
        """limit: train.max_skipped_steps."""
        self._limit = limit
        self._in_a_row = 0
        self._reached = False
        self._gaps: dict[str, float] = {}  # the largest of the skipped ones in a row

    def count(self, results: Sequence[StepResult]) -> int:
        """Count the optimizer steps of one training step; returns how many in a row are skipped at its end."""
        for result in results:
            if not result.skipped:
                self._in_a_row, self._gaps = 0, {}
                continue
            self._in_a_row += 1
            for name in GAPS.keys() & result.largest.keys():
                self._gaps[name] = max(self._gaps.get(name, 0.0), result.largest[name])
            self._reached |= self._in_a_row >= self._limit
            if self._reached:
                break
        return self._in_a_row

    def check(self, done: int) -> None:
        """Raise GradientsNotFinite if the limit is reached. `done`: training steps."""
        if not self._reached:
            return
        raise GradientsNotFinite(
            f"{self._in_a_row} optimizer steps in a row up to step {done} had a gradient that is not finite and were "
            f"skipped (train.max_skipped_steps={self._limit}){_widest(self._gaps)}: lower optimizer.lr or look for bad "
            "rows in the data, then continue with run.resume=true"
        )


def _widest(gaps: Mapping[str, float]) -> str:
    if not gaps:
        return ""
    name = max(gaps, key=lambda name: gaps[name])
    return f"; the largest log-prob gap in them was {gaps[name]:.3g}, between {GAPS[name]} (train/{name})"


def largest_norm(results: Sequence[StepResult]) -> float:
    """The largest gradient norm; one that is not finite is returned first, because max() may hide it."""
    norms = [result.grad_norm for result in results]
    return next((norm for norm in norms if not math.isfinite(norm)), max(norms))
