"""Loss on held-out conversations: the measure of supervised training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.actor.agreement import phase
from collab_megatron.trainer.batching import MicroBatch


@dataclass(frozen=True)
class HeldOutLoss:
    """Held-out loss of the weights of one step; the same on every rank."""

    loss: float  # negative log-likelihood per assistant token, mean, in nats
    tokens: int  # assistant tokens, over which the mean is taken
    conversations: int

    @property
    def perplexity(self) -> float:
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    def metrics(self) -> dict[str, float]:
        """By dashboard name."""
        return {"eval/loss": self.loss, "eval/perplexity": self.perplexity, "eval/tokens": self.tokens}


def mean_loss(actor: Actor, batches: Iterable[Sequence[MicroBatch]], tokens: int) -> float:
    """Mean negative log-likelihood per masked token over the micro-batches of all data ranks, summed in float64.

    batches: this data rank's micro-batches, a few at a time. tokens: masked tokens of all data ranks. A mean over
    tokens does not depend on the micro-batches or on the number of data ranks. Collective over all ranks, each of which
    passes the same number of batches.
    """
    grid = actor.grid
    total = torch.zeros(1, dtype=torch.float64)
    for micro_batches in batches:
        logprobs, _ = actor.logprobs(micro_batches)
        for batch, found in zip(micro_batches, logprobs, strict=True):
            total -= found[batch.mask > 0].double().sum()
    if grid.tp_rank or grid.pp_rank or grid.cp_rank:
        total.zero_()  # every rank of a replica has the same log-probs: count them once
    with phase(grid, "the held-out loss"):
        dist.all_reduce(total, group=grid.cpu_group)
        dist.broadcast(total, src=0, group=grid.cpu_group)  # to the last bit: ranks compare losses
    return total.item() / tokens
