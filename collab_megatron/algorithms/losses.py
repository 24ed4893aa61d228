"""Policy losses as (sum, metric sums): the caller divides by the global token count.

So the same batch gives the same gradient for every micro-batch size and every data-parallel width.
Shapes: every tensor is [B, S], aligned with the tokens; `mask` is 1.0 where a token is trained.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossSum:
    """A differentiable sum over tokens and, per metric, a detached sum over the same tokens."""

    loss: Tensor  # scalar, sum over trained tokens
    metrics: dict[str, Tensor]  # scalars, sums over trained tokens


def low_variance_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The k3 estimator of KL(policy || reference) per token: exp(d) - d - 1 with d = ref - policy. Never negative.

    Source: J. Schulman, "Approximating KL divergence" (2020).
    """
    delta = ref_logprobs - logprobs
    return delta.exp() - delta - 1.0


def importance_weights(logprobs: Tensor, rollout_logprobs: Tensor, cap: float) -> Tensor:
    """Truncated exp(trainer - engine) per token, without gradient: corrects for what the engine really sampled from."""
    return (logprobs - rollout_logprobs).detach().exp().clamp(max=cap)


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
) -> LossSum:
    """Clipped policy gradient on group-relative advantages plus KL to the reference.

    `old_logprobs` are the trainer's own at the start of the step; `rollout_logprobs` the engine's at sampling time.
    Sources: PPO-clip (Schulman et al. 2017, eq. 7); GRPO (Shao et al. 2024, eq. 3).
    """
    # padding holds zeros on both sides, so the ratio there is exp(logprob) of nothing: masked before the exponential
    ratio = ((logprobs - old_logprobs) * mask).exp()
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    weight = importance_weights(old_logprobs * mask, rollout_logprobs * mask, importance_cap)
    loss = -(weight * surrogate)
    metrics = {
        "policy_loss": (loss.detach() * mask).sum(),
        "clip_fraction": ((clipped * advantages < ratio * advantages).float() * mask).sum(),
        "importance_weight": (weight * mask).sum(),
    }
    if ref_logprobs is not None:
        kl = low_variance_kl(logprobs * mask, ref_logprobs * mask)
        loss = loss + kl_coef * kl
        metrics["kl"] = (kl.detach() * mask).sum()
    return LossSum(loss=(loss * mask).sum(), metrics=metrics)


def sft_loss(logprobs: Tensor, *, mask: Tensor) -> LossSum:
    """Negative log-likelihood of the trained tokens."""
    loss = -(logprobs * mask).sum()
    return LossSum(loss=loss, metrics={"nll": loss.detach().clone()})
