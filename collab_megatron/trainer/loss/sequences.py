"""Reductions over the replies of a micro-batch, whatever row or context rank their tokens are in; weights of the mean.

A reply is in one micro-batch as a whole, but in a packed row it lies between others, and under context parallelism its
tokens are on several ranks. So every token has the number of its reply, sums go through that number, and the caller
gives the function that adds the sums of all context ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from collab_megatron.config.sections.algorithms import Aggregation

Reduce = Callable[[Tensor], Tensor]
"""The sum of a tensor over the ranks that share the micro-batch's rows; the tensor itself if there is one."""


def on_this_rank(sums: Tensor) -> Tensor:
    """The sum over one rank."""
    return sums


@dataclass(frozen=True)
class Sequences:
    """Which reply of a micro-batch each token belongs to."""

    index: Tensor  # [B, S] int64, 0..count-1; any at padding
    count: int  # replies of the micro-batch, at least 1
    reduce: Reduce = on_this_rank

    def sums(self, *values: Tensor) -> Tensor:
        """[B, S] each -> [number of values, count]: sums over the tokens of each reply, without gradient.

        One reduction. The values must be 0 where they shall not count.
        """
        stacked = torch.stack([value.detach() for value in values]).flatten(1)
        found = stacked.new_zeros(len(values), self.count).index_add_(1, self.index.flatten(), stacked)
        return self.reduce(found)

    def spread(self, per_sequence: Tensor) -> Tensor:
        """[count] -> [B, S]: every token gets the value of its reply."""
        return per_sequence[self.index]


def mean_weights(lengths_N: Sequence[int], aggregation: Aggregation, *, longest: int) -> list[float]:
    """The weight w_i of each token of reply i, so that sum(w_i * l_it) / (tokens of all replies) is the wanted mean.

    token_mean:     sum of l_it / sum of |o_i|              DAPO (Yu et al. 2025, arXiv 2503.14476, eq. 8)
    sequence_mean:  mean over i of (mean over t of l_it)    GRPO (Shao et al. 2024, arXiv 2402.03300, eq. 3)
    constant:       sum of l_it / (N * longest)             Dr. GRPO (Liu et al. 2025, arXiv 2503.20783, 3.2)

    lengths_N: |o_i|, trained tokens of the replies of one optimizer step on all ranks, each at least 1. So
    micro-batches and ranks do not change the mean. longest: tokens that a reply may have.
    """
    if aggregation == "token_mean":
        return [1.0] * len(lengths_N)
    share = sum(lengths_N) / len(lengths_N)
    if aggregation == "constant":
        return [share / longest] * len(lengths_N)
    return [share / length for length in lengths_N]
