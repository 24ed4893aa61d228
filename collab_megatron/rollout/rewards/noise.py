"""Noise of the multiturn-aware reward: how far futures of one reply differ, and where one more can decide. Pure.

Legend: C distinct replies of a group, those with an estimate of their own; K_C scored futures of each.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def futures_variance(rewards_C: Sequence[Sequence[float]]) -> float | None:
    """Variance of R* between the futures of one reply, pooled over the replies; None if no reply has two rewards.

    rewards_C: for each distinct reply the rewards of its futures.
    """
    squares = degrees = 0.0
    for rewards in rewards_C:
        if len(rewards) > 1:
            squares += statistics.variance(rewards) * (len(rewards) - 1)
            degrees += len(rewards) - 1
    return squares / degrees if degrees else None


def noise_variance(rewards_C: Sequence[Sequence[float]], copies_C: Sequence[int]) -> float | None:
    """The part of the variance of MR over a group's replies that is noise of the simulators; None if unknown.

    With a variance v between futures, the MR of a distinct reply has the variance v / K. With a share p of the replies
    that are its copies, it adds p (1 - p) v / K to the variance over all n replies, here with n - 1 in the denominator.
    copies_C: replies of the group that share each estimate, itself included.
    """
    variance, replies = futures_variance(rewards_C), sum(copies_C)
    if variance is None or replies < 2 or not all(rewards_C):
        return None
    shares = [copies / replies for copies in copies_C]
    noise = sum(p * (1 - p) * variance / len(rewards) for p, rewards in zip(shares, rewards_C, strict=True))
    return noise * replies / (replies - 1)


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
