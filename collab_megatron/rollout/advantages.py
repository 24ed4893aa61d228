"""Group-relative advantages (GRPO, Shao et al. 2024) over multiturn-aware rewards."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def group_advantages(rewards_G: Sequence[float], *, eps: float, min_std: float) -> list[float]:
    """(reward - mean) / (std + eps); zeros for a standard deviation below `min_std`.

    `eps` is not tiny on purpose: where all replies are wrong only their lengths differ, and a division by that small
    spread would turn a few tokens into full-size advantages. Raises ValueError for fewer than two rewards.
    """
    if len(rewards_G) < 2:
        raise ValueError(f"a group needs at least two rewards, got {len(rewards_G)}")
    std = statistics.stdev(rewards_G)
    if std < min_std:
        return [0.0] * len(rewards_G)
    mean = statistics.fmean(rewards_G)
    return [(reward - mean) / (std + eps) for reward in rewards_G]
