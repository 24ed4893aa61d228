"""Estimators of KL(policy || reference) per token, from the log-probability of the sampled token alone.

Source of all three: J. Schulman, "Approximating KL divergence" (2020), with d = log-prob of policy - of reference:

    k1 = d                  unbiased; as a term of the loss its expected gradient is 0
    k2 = d**2 / 2           biased; as a term of the loss its expected gradient is that of the KL
    k3 = exp(-d) + d - 1    unbiased, never negative
"""

from __future__ import annotations

from torch import Tensor

from collab_megatron.config.sections.algorithms import KLEstimator

MAX_LOG_RATIO = 20.0
"""Differences of log-probs are clamped to plus or minus this before the exponential: above 88 it is inf in fp32, and
inf times a gradient of 0 is NaN. This limit and the next are those of verl (trainer/ppo/core_algos.py)."""
MAX_KL = 10.0
"""k3 of one token is cut here, and so is its gradient: a token further from the reference than that has none. k3 grows
with exp(ref - policy), so without the cut one token in 5,000 takes most of a step's gradient."""


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: KLEstimator = "k3") -> Tensor:
    """The estimate per token; k3 is at most MAX_KL."""
    estimate = unclamped_kl(logprobs, ref_logprobs, kind)
    return estimate.clamp(max=MAX_KL) if kind == "k3" else estimate


def unclamped_kl(logprobs: Tensor, ref_logprobs: Tensor, kind: KLEstimator) -> Tensor:
    """As kl_estimate, without MAX_KL."""
    delta = logprobs - ref_logprobs
    if kind == "k1":
        return delta
    if kind == "k2":
        return delta.square() / 2
    delta = delta.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (-delta).exp() + delta - 1.0
