"""A random step in fp64 for the tests of losses: eight replies in two groups, as tensors [B, S] and as samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from collab_megatron.config.sections import AlgorithmSection
from collab_megatron.trainer.loss.losses import LossSum, policy_loss
from collab_megatron.trainer.loss.sequences import Sequences, mean_weights

LENGTHS = (6, 1, 3, 5, 2, 4, 6, 3)
GROUPS = (0, 0, 0, 0, 1, 1, 1, 1)
LONGEST = 10


@dataclass(frozen=True)
class Step:
    """One reply a row; every tensor is 0 outside the mask."""

    mask: Tensor
    logprobs: Tensor
    old: Tensor
    rollout: Tensor
    reference: Tensor
    advantages: Tensor  # one value a reply
    entropy: Tensor
    rewards: Tensor  # [B]

    @property
    def sequences(self) -> Sequences:
        rows = torch.arange(len(LENGTHS))[:, None].expand_as(self.mask)
        return Sequences(rows, len(LENGTHS))

    def mean(self, loss: LossSum) -> Tensor:
        return loss.loss / self.mask.sum()

    def loss(self, logprobs: Tensor, algorithm: AlgorithmSection, **given: Any) -> LossSum:
        """policy_loss of all replies, with the weights of the algorithm's mean."""
        weights = torch.tensor(mean_weights(LENGTHS, algorithm.aggregation, longest=LONGEST), dtype=torch.float64)
        wanted: dict[str, Any] = {
            "old_logprobs": self.old,
            "rollout_logprobs": self.rollout,
            "ref_logprobs": self.reference,
            "advantages": self.advantages,
            "mask": self.mask,
            "sequences": self.sequences,
            "weights": weights[:, None] * self.mask,
            "entropy": self.entropy,
        }
        return policy_loss(logprobs, algorithm=algorithm, **(wanted | given))


def random_step(seed: int = 0) -> Step:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.float64)
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = 1.0

    def noise(scale: float) -> Tensor:
        return torch.randn(mask.shape, generator=generator, dtype=torch.float64) * scale * mask

    advantages = torch.randn(len(LENGTHS), 1, generator=generator, dtype=torch.float64) * mask
    base = -2 * mask
    return Step(
        mask=mask,
        logprobs=base + noise(0.3),
        old=base + noise(0.3),
        rollout=base + noise(0.4),
        reference=base + noise(1.0),
        advantages=advantages,
        entropy=noise(1.0).abs(),
        rewards=torch.randn(len(LENGTHS), generator=generator, dtype=torch.float64),
    )
