"""Losses as sums over tokens, with metric sums: the caller divides by the global token count.

So a batch has the same gradient for every micro-batch size and every number of data ranks.
Shapes: every tensor is [B, S], aligned with the tokens; `mask` is 1.0 where a token is trained.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from collab_megatron.config.sections import AlgorithmSection
from collab_megatron.trainer.loss.importance import limited, raw_weights
from collab_megatron.trainer.loss.kl import MAX_KL, MAX_LOG_RATIO, kl_estimate, unclamped_kl
from collab_megatron.trainer.loss.sequences import Sequences
from collab_megatron.trainer.loss.surrogates import (
    Surrogate,
    cispo_surrogate,
    dual_clipped,
    gspo_surrogate,
    ppo_surrogate,
)


@dataclass(frozen=True)
class LossSum:
    """A differentiable sum over trained tokens, with detached metrics over the same tokens."""

    loss: Tensor  # scalar, sum over trained tokens
    metrics: dict[str, Tensor]  # scalars, sums over trained tokens
    # scalars >= 0, the largest value over trained tokens; inf for NaN
    largest: dict[str, Tensor] = field(default_factory=dict)


def largest(values: Tensor, mask: Tensor) -> Tensor:
    """The largest absolute value under the mask, a detached scalar; 0 where nothing is trained, inf for NaN."""
    return (values.detach() * mask).abs().nan_to_num(nan=torch.inf, posinf=torch.inf).max()


def policy_loss(
    logprobs: Tensor,
    *,
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    algorithm: AlgorithmSection,
    sequences: Sequences | None = None,
    weights: Tensor | None = None,
    entropy: Tensor | None = None,
) -> LossSum:
    """sum of weight * (-importance * surrogate + kl_coef * KL - entropy_coef * entropy) over the trained tokens.

    old_logprobs: the trainer's at the start of the step. rollout_logprobs: the engine's at sampling time. ref_logprobs:
    None: no KL. sequences: needed for policy_loss gspo and importance sequence. weights: of the mean (mean_weights);
    None: 1. entropy: of each token's distribution, with gradient; needed for entropy_coef > 0. The pieces with their
    sources are in surrogates.py, importance.py, kl.py and sequences.py. The bonus is the term c2 S[pi](s_t) of PPO
    (Schulman et al. 2017, arXiv 1707.06347, eq. 9), with S = -sum over v of pi(v) log pi(v).
    """
    # masked before the exponential: log-probs at padding are meaningless, and their ratio may overflow
    log_ratio = (logprobs - old_logprobs) * mask
    surrogate, clipped = _surrogate(logprobs * mask, log_ratio, advantages, mask, algorithm, sequences)
    metrics, most = {}, {}
    if algorithm.clip_dual is not None:
        surrogate, bounded = dual_clipped(surrogate, advantages, algorithm.clip_dual)
        metrics["dual_clip_fraction"] = (bounded * mask).sum()
    gap = ((old_logprobs - rollout_logprobs) * mask).detach()
    raw = raw_weights(gap, algorithm.importance, sequences)
    masks, floor, cap = algorithm.importance_beyond == "mask", algorithm.importance_floor, algorithm.importance_cap
    weight = raw if algorithm.importance == "none" else limited(raw, masks=masks, floor=floor, cap=cap)
    mean_weight = mask if weights is None else weights * mask
    loss = -(weight * surrogate)
    metrics |= {
        "policy_loss": (loss.detach() * mean_weight).sum(),
        "clip_fraction": (clipped.detach() * mask).sum(),
        "log_ratio_clamped": ((log_ratio.detach().abs() > MAX_LOG_RATIO).to(mask.dtype) * mask).sum(),
    }
    if algorithm.importance != "none":
        beyond = (raw > cap) | (raw < floor)  # a floor above 0 comes with masks only
        metrics |= {
            "importance_weight": (weight * mask).sum(),
            "importance_weight_squared": (weight.square() * mask).sum(),
            "importance_beyond": (beyond.to(mask.dtype) * mask).sum(),
        }
        most["importance_weight_max"] = largest(raw, mask)
    most["log_ratio_max"] = largest(log_ratio, mask)
    most["logprob_gap_max"] = largest(gap, mask)
    if ref_logprobs is not None:
        kl, kl_metrics, kl_most = _kl(logprobs * mask, ref_logprobs * mask, mask, algorithm)
        metrics, most = metrics | kl_metrics, most | kl_most
        if not algorithm.kl_in_reward:
            loss = loss + algorithm.kl_coef * kl
    if algorithm.entropy_coef:
        assert entropy is not None, "an entropy bonus needs the entropy"
        loss = loss - algorithm.entropy_coef * entropy
    return LossSum(loss=(loss * mean_weight).sum(), metrics=metrics, largest=most)


def sft_loss(logprobs: Tensor, *, mask: Tensor) -> LossSum:
    """Negative log-likelihood of the trained tokens."""
    loss = -(logprobs * mask).sum()
    return LossSum(loss=loss, metrics={"nll": loss.detach().clone()})


def _surrogate(
    logprobs: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    algorithm: AlgorithmSection,
    sequences: Sequences | None,
) -> Surrogate:
    low, high = algorithm.clip_low, algorithm.clip_high
    if algorithm.policy_loss == "cispo":
        return cispo_surrogate(logprobs, log_ratio, advantages, low=low, high=high)
    if algorithm.policy_loss == "gspo":
        assert sequences is not None, "ratios of sequences need to know them"
        return gspo_surrogate(log_ratio, advantages, mask, sequences, low=low, high=high)
    return ppo_surrogate(log_ratio, advantages, low=low, high=high)


def _kl(
    policy: Tensor, reference: Tensor, mask: Tensor, algorithm: AlgorithmSection
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The estimate per token, its metrics and largest values. Both log-probs are 0 outside the mask."""
    kl = kl_estimate(policy, reference, algorithm.kl_estimator)
    before = unclamped_kl(policy.detach(), reference, algorithm.kl_estimator)
    cut = before > MAX_KL if algorithm.kl_estimator == "k3" else torch.zeros_like(before, dtype=torch.bool)
    metrics = {"kl": (kl.detach() * mask).sum(), "kl_clamped": (cut.to(mask.dtype) * mask).sum()}
    return kl, metrics, {"kl_max": largest(before, mask), "ref_gap_max": largest(reference - policy, mask)}
