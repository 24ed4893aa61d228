"""Which samples of a global batch this data rank trains, and in which micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from collab_megatron.actor.grid import RankGrid
from collab_megatron.batching import MicroBatch, TokenSample, idle_like, split_by_tokens
from collab_megatron.batching.balance import balanced_shares
from collab_megatron.config.sections import TrainSection
from collab_megatron.convert.spec import ModelSpec
from collab_megatron.monitor.flops import sample_cost

PAD_ID = 0
"""Any valid id: padding stands right of the tokens, masked and unseen by causal attention."""


@dataclass(frozen=True)
class Share:
    """One data rank's part of a batch."""

    micro_batches: list[MicroBatch]  # at least one; it trains nothing where there are fewer samples than ranks
    imbalance: float  # cost of the most loaded data rank / mean; 1 is even. The same on every rank


def my_share(grid: RankGrid, spec: ModelSpec, samples: Sequence[TokenSample], train: TrainSection) -> Share:
    """Balanced by what each sequence costs this model, its quadratic attention included."""
    costs = [sample_cost(spec, len(sample.ids)) for sample in samples]
    shares = balanced_shares(costs, grid.dp_size)
    loads = [sum(costs[i] for i in share) for share in shares]
    mine = [samples[i] for i in shares[grid.dp_rank]]
    micro_batches = split_by_tokens(
        mine or samples[:1],
        micro_batch_tokens=train.micro_batch_tokens,
        pad_id=PAD_ID,
        pad_multiple=grid.pad_multiple,
        packed=train.packing,
    )
    if not mine:
        micro_batches = [idle_like(micro_batches[0], grid.pad_multiple)]
    return Share(micro_batches, imbalance=max(loads) * len(loads) / sum(loads))
