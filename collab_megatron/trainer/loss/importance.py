"""Importance weights between the trainer's and the engine's log-probs of the same weights.

Truncated weights: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training" (token,
w = min(exp(d), cap)). Masked weights: Zhao et al. 2025, "Small leak can sink a great ship" (IcePop; w = exp(d) inside
[floor, cap], else 0). With d = trainer's log-prob - engine's log-prob; at the level of a sequence d is the sum over the
reply, so that w is the ratio of the whole reply's probabilities. No gradient passes through a weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from collab_megatron.config.sections.algorithms import ImportanceLevel
from collab_megatron.trainer.loss.kl import MAX_LOG_RATIO
from collab_megatron.trainer.loss.sequences import Sequences


def raw_weights(gap: Tensor, level: ImportanceLevel, sequences: Sequences | None) -> Tensor:
    """gap [B, S]: trainer - engine, 0 outside the mask -> exp(d) [B, S], with d clamped to MAX_LOG_RATIO."""
    if level == "none":
        return torch.ones_like(gap)
    if level == "sequence":
        assert sequences is not None, "weights of sequences need to know them"
        gap = sequences.spread(sequences.sums(gap)[0])
    return gap.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def limited(weights: Tensor, *, masks: bool, floor: float, cap: float) -> Tensor:
    """Truncated at `cap`, or with `masks` 0 outside [floor, cap]."""
    if not masks:
        return weights.clamp(max=cap)
    return torch.where((weights < floor) | (weights > cap), 0.0, weights)
