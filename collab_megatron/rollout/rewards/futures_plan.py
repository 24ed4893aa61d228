"""More futures for some replies: those where one more can change the ranking of the group. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def futures_variance(rewards_C: Sequence[Sequence[float]]) -> float | None:
    """Variance of R* between futures of one reply, pooled over the replies; None if no reply has two rewards.

    rewards_C: of each distinct reply, the rewards of its futures.
    """
    squares = degrees = 0.0
    for rewards in rewards_C:
        if len(rewards) > 1:
            squares += statistics.variance(rewards) * (len(rewards) - 1)
            degrees += len(rewards) - 1
    return squares / degrees if degrees else None


def undecided(rewards_C: Sequence[Sequence[float]]) -> list[int]:
    """The replies for which one more future can change the ranking, the closest first.

    With a variance v between futures, one more future moves a mean over K of them by a standard deviation of
    sqrt(v / (K (K + 1))). A reply is undecided while another reply's mean is no farther away than that.
    """
    variance = futures_variance(rewards_C)
    if not variance:
        return []
    means = {c: statistics.fmean(rewards) for c, rewards in enumerate(rewards_C) if rewards}
    found: list[tuple[float, int]] = []
    for c, mean in means.items():
        count = len(rewards_C[c])
        step = math.sqrt(variance / (count * (count + 1)))
        gap = min((abs(mean - other) for d, other in means.items() if d != c), default=math.inf)
        if gap <= step:
            found.append((gap / step, c))
    return [c for _, c in sorted(found)]
