"""Loss on held-out rows: the measure of supervised training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.actor.agreement import phase
from collab_megatron.trainer.actor.grid import RankGrid
from collab_megatron.trainer.batching import MicroBatch

Measure = Callable[[Sequence[MicroBatch]], Tensor]
"""Float64 sums over this rank's micro-batches, one tensor [N]; collective as Actor.logprobs."""


class HeldOut(Protocol):
    """Held-out figures of the weights of one step; the same on every rank."""

    @property
    def loss(self) -> float:
        """The lower, the better: the checkpoint with the lowest is the best."""
        ...

    @property
    def described(self) -> str:
        """The other figures, for the terminal."""
        ...

    def metrics(self) -> dict[str, float]:
        """By dashboard name."""
        ...


@dataclass(frozen=True)
class HeldOutLoss:
    """Of conversations."""

    loss: float  # negative log-likelihood per assistant token, mean, in nats
    tokens: int  # assistant tokens, over which the mean is taken
    conversations: int

    @property
    def perplexity(self) -> float:
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    @property
    def described(self) -> str:
        return f"perplexity {self.perplexity:.3f}, {self.conversations:,} conversations, {self.tokens:,} tokens"

    def metrics(self) -> dict[str, float]:
        """By dashboard name."""
        return {"eval/loss": self.loss, "eval/perplexity": self.perplexity, "eval/tokens": self.tokens}


@dataclass(frozen=True)
class HeldOutPairs:
    """Of pairs of replies."""

    loss: float  # DPO loss, mean over pairs
    accuracy: float  # share of pairs that the policy ranks right
    margin: float  # mean difference of the rewards of the chosen and the rejected reply
    tokens: int  # trained tokens of both replies
    pairs: int

    @property
    def described(self) -> str:
        return f"{self.accuracy:.1%} of {self.pairs:,} pairs ranked right, reward margin {self.margin:.3f}"

    def metrics(self) -> dict[str, float]:
        """By dashboard name."""
        return {
            "eval/loss": self.loss,
            "eval/pair_accuracy": self.accuracy,
            "eval/reward_margin": self.margin,
            "eval/tokens": self.tokens,
        }


def mean_loss(actor: Actor, batches: Iterable[Sequence[MicroBatch]], tokens: int) -> float:
    """Mean negative log-likelihood per masked token over the micro-batches of all data ranks, summed in float64.

    batches: this data rank's micro-batches, a few at a time. tokens: masked tokens of all data ranks. A mean over
    tokens does not depend on the micro-batches or on the number of data ranks. Collective over all ranks, each of which
    passes the same number of batches.
    """

    def measure(micro_batches: Sequence[MicroBatch]) -> Tensor:
        logprobs, _ = actor.logprobs(micro_batches)
        parts = [found[b.mask > 0].double().sum() for b, found in zip(micro_batches, logprobs, strict=True)]
        return -torch.stack(parts).sum()[None]

    (total,) = sums_of_all_ranks(actor.grid, batches, measure, 1)
    return total / tokens


def sums_of_all_ranks(
    grid: RankGrid, batches: Iterable[Sequence[MicroBatch]], measure: Measure, count: int
) -> list[float]:
    """The `count` sums of `measure` over the batches of all data ranks, equal to the last bit on every rank. Collective
    as `mean_loss`."""
    total = torch.zeros(count, dtype=torch.float64)
    for micro_batches in batches:
        total += measure(micro_batches)
    if grid.tp_rank or grid.pp_rank or grid.cp_rank:
        total.zero_()  # every rank of a replica has the same log-probs: count them once
    with phase(grid, "the held-out loss"):
        dist.all_reduce(total, group=grid.cpu_group)
        dist.broadcast(total, src=0, group=grid.cpu_group)  # to the last bit: ranks compare losses
    found: list[float] = total.tolist()
    return found
