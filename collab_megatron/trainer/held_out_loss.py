"""The loss on held-out conversations, by which supervised training is judged."""

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
    """What the weights of one step make of the held-out conversations; the same on every rank."""

    loss: float  # negative log-likelihood of an assistant token, mean over all of them, in nats
    tokens: int  # that the mean is over
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
    """Negative log-likelihood under the masks of all data ranks' micro-batches / `tokens`, summed in float64.

    `batches`: this data rank's micro-batches, a few at a time; `tokens`: trained ones of all data ranks. The mean is
    over tokens, so it does not depend on how they are cut and shared. Collective over all ranks: each passes equally
    many batches.
    """
    grid = actor.grid
    total = torch.zeros(1, dtype=torch.float64)
    for micro_batches in batches:
        logprobs, _ = actor.logprobs(micro_batches)
        for batch, found in zip(micro_batches, logprobs, strict=True):
            total -= found[batch.mask > 0].double().sum()
    if grid.tp_rank or grid.pp_rank or grid.cp_rank:
        total.zero_()  # every rank of a replica has the same log-probs: one of them counts
    with phase(grid, "the held-out loss"):
        dist.all_reduce(total, group=grid.cpu_group)
        dist.broadcast(total, src=0, group=grid.cpu_group)  # to the last bit: ranks must agree on what is the lowest
    return total.item() / tokens
