"""Surrogates of the policy gradient: what a token contributes to the objective, which is maximized.

Legend: r the ratio of the token's probability under the policy and under the policy at the start of the step, A its
advantage, s the reply's ratio, sg a value without gradient. Every tensor is [B, S]; log_ratio is 0 outside the mask.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from collab_megatron.trainer.loss.kl import MAX_LOG_RATIO
from collab_megatron.trainer.loss.sequences import Sequences


class Surrogate(NamedTuple):
    """Per token: the surrogate, and where the clip changed it (float, 1 or 0)."""

    value: Tensor
    clipped: Tensor


def clamped_exp(log_ratio: Tensor) -> Tensor:
    """exp of a difference of log-probs, clamped so that it is finite; no gradient where it is clamped."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def ppo_surrogate(log_ratio: Tensor, advantages: Tensor, *, low: float, high: float) -> Surrogate:
    """min(r * A, clip(r, 1 - low, 1 + high) * A).

    PPO (Schulman et al. 2017, arXiv 1707.06347, eq. 7); two limits are DAPO's clip-higher (Yu et al. 2025, arXiv
    2503.14476, eq. 10).
    """
    ratio = clamped_exp(log_ratio)
    return _clipped(ratio, advantages, low=low, high=high)


def gspo_surrogate(
    log_ratio: Tensor, advantages: Tensor, mask: Tensor, sequences: Sequences, *, low: float, high: float
) -> Surrogate:
    """min(s * A, clip(s, 1 - low, 1 + high) * A) with s = exp(mean over the reply's tokens of log r), as in GSPO.

    In the form of GSPO-token: every token has s_t = sg[s] * r_t / sg[r_t]. With equal advantages in a reply its value
    is that of s, and its mean over the reply has the gradient of s, because grad s = s * mean(grad log r_t). So the
    reply's sum needs no gradient, and none passes between context ranks. Source: Zheng et al. 2025, arXiv 2507.18071,
    eq. 5, 7, 14 and 15.
    """
    total, count = sequences.sums(log_ratio, mask)
    mean = sequences.spread(total / count.clamp(min=1.0))
    ratio = clamped_exp(mean + log_ratio - log_ratio.detach())
    return _clipped(ratio, advantages, low=low, high=high)


def cispo_surrogate(logprobs: Tensor, log_ratio: Tensor, advantages: Tensor, *, low: float, high: float) -> Surrogate:
    """sg[clip(r, 1 - low, 1 + high)] * A * log-prob: a clipped token keeps its gradient, with a bounded weight.

    CISPO (MiniMax 2025, arXiv 2506.13585, eq. 4 and 5).
    """
    ratio = clamped_exp(log_ratio).detach()
    weight = ratio.clamp(1.0 - low, 1.0 + high)
    return Surrogate(weight * advantages * logprobs, (weight != ratio).to(ratio.dtype))


def dual_clipped(surrogate: Tensor, advantages: Tensor, limit: float) -> Surrogate:
    """max(surrogate, limit * A) where A < 0: PPO's clip does not bound large ratios there.

    Dual-clip PPO (Ye et al. 2019, arXiv 1912.09729, eq. 6); limit > 1.
    """
    bounded = (advantages < 0) & (surrogate < limit * advantages)
    return Surrogate(torch.where(bounded, limit * advantages, surrogate), bounded.to(surrogate.dtype))


def _clipped(ratio: Tensor, advantages: Tensor, *, low: float, high: float) -> Surrogate:
    inside = ratio.clamp(1.0 - low, 1.0 + high)
    value = torch.minimum(ratio * advantages, inside * advantages)
    return Surrogate(value, (inside * advantages < ratio * advantages).to(ratio.dtype))
