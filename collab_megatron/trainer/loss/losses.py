"""Losses as sums over tokens, with metric sums: the caller divides by the global token count.

So a batch has the same gradient for every micro-batch size and every number of data ranks.
Shapes: every tensor is [B, S], aligned with the tokens; `mask` is 1.0 where a token is trained.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Differences of log-probs are clamped to plus or minus this before the exponential: above 88 it is inf in fp32, and
inf times a gradient of 0 is NaN. This limit and the next are those of verl (trainer/ppo/core_algos.py)."""
MAX_KL = 10.0
"""The KL estimate of one token is cut here, and so is its gradient: a token further from the reference than that has
none. k3's grows with exp(ref - policy), so without the cut one token in 5,000 takes most of a step's gradient."""


@dataclass(frozen=True)
class LossSum:
    """A differentiable sum over trained tokens, with detached metrics over the same tokens."""

    loss: Tensor  # scalar, sum over trained tokens
    metrics: dict[str, Tensor]  # scalars, sums over trained tokens
    # scalars >= 0, the largest value over trained tokens; inf for NaN
    largest: dict[str, Tensor] = field(default_factory=dict)


def clamped_exp(log_ratio: Tensor) -> Tensor:
    """exp of a difference of log-probs, clamped so that it is finite; no gradient where it is clamped."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def largest(values: Tensor, mask: Tensor) -> Tensor:
    """The largest absolute value under the mask, a detached scalar; 0 where nothing is trained, inf for NaN."""
    return (values.detach() * mask).abs().nan_to_num(nan=torch.inf, posinf=torch.inf).max()


def low_variance_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The k3 estimator of KL(policy || reference) per token: exp(d) - d - 1 with d = ref - policy, at most MAX_KL.

    Never negative. Source: J. Schulman, "Approximating KL divergence" (2020).
    """
    return _k3(logprobs, ref_logprobs).clamp(max=MAX_KL)


def _k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    delta = (ref_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return delta.exp() - delta - 1.0


def importance_weights(logprobs: Tensor, rollout_logprobs: Tensor, cap: float) -> Tensor:
    """Truncated exp(trainer - engine) per token, without gradient: corrects for the engine's sampling distribution."""
    return clamped_exp((logprobs - rollout_logprobs).detach()).clamp(max=cap)


def grpo_loss(
    logprobs: Tensor,
    *,
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    importance_cap: float,
    clip_dual: float | None = None,
) -> LossSum:
    """Clipped policy gradient on group-relative advantages plus KL to the reference.

    old_logprobs: the trainer's at the start of the step. rollout_logprobs: the engine's at sampling time. clip_dual:
    (> 1) bounds the surrogate of a negative advantage from below by clip_dual * advantage; None: no bound, because
    PPO's clip does not limit large ratios there.
    Sources: PPO-clip (Schulman et al. 2017, eq. 7); GRPO (Shao et al. 2024, eq. 3); dual-clip (Ye et al. 2019, eq. 6).
    """
    # masked before the exponential: log-probs at padding are meaningless, and their ratio may overflow
    log_ratio = (logprobs - old_logprobs) * mask
    ratio = clamped_exp(log_ratio)
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    dual: dict[str, Tensor] = {}
    if clip_dual is not None:
        bounded = (advantages < 0) & (surrogate < clip_dual * advantages)
        surrogate = torch.where(bounded, clip_dual * advantages, surrogate)
        dual["dual_clip_fraction"] = (bounded.float() * mask).sum()
    weight = importance_weights(old_logprobs * mask, rollout_logprobs * mask, importance_cap)
    loss = -(weight * surrogate)
    metrics = {
        "policy_loss": (loss.detach() * mask).sum(),
        "clip_fraction": ((clipped * advantages < ratio * advantages).float() * mask).sum(),
        "importance_weight": (weight * mask).sum(),
        "log_ratio_clamped": ((log_ratio.detach().abs() > MAX_LOG_RATIO).float() * mask).sum(),
        **dual,
    }
    most = {
        "log_ratio_max": largest(log_ratio, mask),
        "logprob_gap_max": largest((old_logprobs - rollout_logprobs) * mask, mask),
    }
    if ref_logprobs is not None:
        policy, reference = logprobs * mask, ref_logprobs * mask
        kl = low_variance_kl(policy, reference)
        loss = loss + kl_coef * kl
        before = _k3(policy.detach(), reference)
        metrics["kl"] = (kl.detach() * mask).sum()
        metrics["kl_clamped"] = ((before > MAX_KL).float() * mask).sum()
        most["kl_max"] = largest(before, mask)
        most["ref_gap_max"] = largest(reference - policy, mask)
    return LossSum(loss=(loss * mask).sum(), metrics=metrics, largest=most)


def sft_loss(logprobs: Tensor, *, mask: Tensor) -> LossSum:
    """Negative log-likelihood of the trained tokens."""
    loss = -(logprobs * mask).sum()
    return LossSum(loss=loss, metrics={"nll": loss.detach().clone()})
