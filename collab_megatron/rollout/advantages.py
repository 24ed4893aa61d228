"""From multiturn-aware rewards to advantages. Pure: the driver uses it within a group, the trainer over a whole step.

Legend: r_i reward of reply i, n replies of its group, |o_i| tokens of reply i, b the coefficient of the KL.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from collab_megatron.config.sections.algorithms import Baseline, Scale

VARIANCE_EPS = 1e-8
"""Added to the variance over a step's tokens, as in verl (utils/torch_functional.py, masked_whiten)."""


def group_advantages(
    rewards_G: Sequence[float],
    *,
    eps: float,
    min_std: float,
    baseline: Baseline = "group",
    scale: Scale = "group_std",
) -> list[float]:
    """The advantages inside one group; zeros for a standard deviation below `min_std`.

    group, group_std:     A_i = (r_i - mean(r)) / (std(r) + eps)      GRPO (Shao et al. 2024, arXiv 2402.03300, 4.1.2)
    group, none:          A_i = r_i - mean(r)                         Dr. GRPO (Liu et al. 2025, arXiv 2503.20783, 3.2)
    leave_one_out, none:  A_i = r_i - sum over j != i of r_j / (n-1)  RLOO (Ahmadian et al. 2024, arXiv 2402.14740, 2.3)
    batch:                A_i = r_i, unchanged: step_advantages subtracts the mean over the step's tokens

    With scale batch_std the result is divided in step_advantages. `eps` is not tiny on purpose: where all replies are
    wrong only their lengths differ, and a division by that small spread would turn a few tokens into full-size
    advantages. Raises ValueError for fewer than two rewards.
    """
    if len(rewards_G) < 2:
        raise ValueError(f"a group needs at least two rewards, got {len(rewards_G)}")
    if baseline == "batch":
        return list(rewards_G)
    std = statistics.stdev(rewards_G)
    if std < min_std:
        return [0.0] * len(rewards_G)
    mean, count = statistics.fmean(rewards_G), len(rewards_G)
    if baseline == "leave_one_out":
        return [reward - (mean * count - reward) / (count - 1) for reward in rewards_G]
    return [(reward - mean) / (std + eps if scale == "group_std" else 1.0) for reward in rewards_G]


def overlong_shaping(tokens: int, *, longest: int, share: float, penalty: float) -> float:
    """What is added to the reward of a reply of `tokens` tokens; never positive.

    R(o) = 0                            for |o| <= L - C
           penalty * (L - C - |o|) / C  above: -penalty at L tokens
    with L = longest and C = share * L. DAPO (Yu et al. 2025, arXiv 2503.14476, eq. 13), whose penalty is 1.
    """
    buffer = share * longest
    if not buffer:
        return 0.0
    return penalty * min(0.0, max(-1.0, (longest - buffer - tokens) / buffer))


def kl_returns(reward: float, kl_T: Sequence[float], coef: float) -> list[float]:
    """The return of each token where the KL is part of the reward: r_i - b * sum over t' >= t of KL_t'.

    REINFORCE++ (Hu et al. 2025, arXiv 2501.03262, 3.1). The first entry is the reward of the whole reply.
    """
    returns, later = [], 0.0
    for kl in reversed(kl_T):
        later += kl
        returns.append(reward - coef * later)
    return returns[::-1]


def normalized_over_tokens(advantages_N_T: Sequence[Sequence[float]]) -> list[list[float]]:
    """A' = (A - mean(A)) / sqrt(var(A) + 1e-8), mean and unbiased variance over all tokens of the step.

    REINFORCE++ (Hu et al. 2025, arXiv 2501.03262, 3.1); its baseline variant passes A - the group's mean. Fewer than
    two tokens have no variance and get 0.
    """
    every = [value for values_T in advantages_N_T for value in values_T]
    if len(every) < 2:
        return [[0.0] * len(values_T) for values_T in advantages_N_T]
    mean = math.fsum(every) / len(every)
    variance = math.fsum((value - mean) ** 2 for value in every) / (len(every) - 1)
    scale = 1.0 / math.sqrt(variance + VARIANCE_EPS)
    return [[(value - mean) * scale for value in values_T] for values_T in advantages_N_T]
