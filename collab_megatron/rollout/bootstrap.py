"""Bootstrap intervals of means over held-out tasks. Pure.

Rows of one conversation (its opening and later turns) share a request and are not independent, so whole requests are
drawn: cluster bootstrap, percentile interval (Efron and Tibshirani 1993, chapters 13 and 14). The mean is that of all
values, each with the same weight. If all values are equal the interval has no width, which is not certainty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CHUNK = 200  # samples at a time: 1,000 requests of 8 bytes each take 1.6 MB


@dataclass(frozen=True)
class Interval:
    """A mean and its interval.

    Example: Interval(0.5, 0.41, 0.59, 100): 100 values with mean 0.5.
    """

    mean: float
    low: float | None  # None: one request only
    high: float | None
    count: int  # values

    def as_dict(self) -> dict[str, float | int | None]:
        return {"mean": self.mean, "low": self.low, "high": self.high, "count": self.count}


def bootstrap_mean(
    values: Sequence[float], requests: Sequence[str], *, confidence: float, resamples: int, seed: int
) -> Interval | None:
    """The mean of `values`, of which each belongs to one of `requests`; None without values.

    The draws depend on the order of the requests: sort them for equal results."""
    if not values:
        return None
    groups: dict[str, tuple[float, int]] = {}
    for value, request in zip(values, requests, strict=True):
        total, count = groups.get(request, (0.0, 0))
        groups[request] = (total + value, count + 1)
    sums = np.array([total for total, _ in groups.values()])
    counts = np.array([count for _, count in groups.values()], dtype=float)
    mean = float(sums.sum() / counts.sum())
    if len(groups) < 2:
        return Interval(mean, None, None, len(values))
    rng = np.random.default_rng(seed)
    means = []
    for begin in range(0, resamples, CHUNK):
        drawn = rng.integers(0, len(groups), size=(min(CHUNK, resamples - begin), len(groups)))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    tail = 50 * (1 - confidence)
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return Interval(mean, float(low), float(high), len(values))
