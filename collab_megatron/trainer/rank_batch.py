"""Which samples of a global batch this data rank trains, and in which micro-batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from collab_megatron.config.sections import TrainSection
from collab_megatron.model.flops import sample_cost
from collab_megatron.model.spec import ModelSpec
from collab_megatron.trainer.actor.grid import RankGrid
from collab_megatron.trainer.batching import MicroBatch, TokenSample, idle_like, split_by_tokens
from collab_megatron.trainer.batching.partition import balanced_partition

PAD_ID = 0
"""Any valid id: padding stands right of the tokens, masked and unseen by causal attention."""


@dataclass(frozen=True)
class RankBatch:
    """One data rank's part of a batch."""

    micro_batches: list[MicroBatch]  # at least one; it trains nothing where there are fewer samples than ranks
    imbalance: float  # cost of the most loaded data rank / mean; 1 is even. The same on every rank


def rank_batch(grid: RankGrid, spec: ModelSpec, samples: Sequence[TokenSample], train: TrainSection) -> RankBatch:
    """Balanced by what each sequence costs this model, its quadratic attention included."""
    share = _sharing_pays(grid, samples, train)
    shares, loads = _assign(spec, samples, grid.dp_size, share)
    mine = [samples[i] for i in shares[grid.dp_rank]]
    micro_batches = split_by_tokens(
        mine or samples[:1],
        micro_batch_tokens=train.micro_batch_tokens,
        pad_id=PAD_ID,
        pad_multiple=grid.pad_multiple,
        packed=train.packing,
        share=share,
    )
    if not mine:
        micro_batches = [idle_like(micro_batches[0], grid.pad_multiple)]
    return RankBatch(micro_batches, imbalance=max(loads) * len(loads) / sum(loads))


def _sharing_pays(grid: RankGrid, samples: Sequence[TokenSample], train: TrainSection) -> bool:
    """Whether samples may share their prompts under this layout and any do; the same on every rank."""
    if not train.share_prompts or grid.cp_size > 1 or grid.backend.name == "cuda":  # there: not tried yet
        return False
    prefixes = [sample.prefix for sample in samples if sample.shareable]
    return len(set(prefixes)) < len(prefixes)


def _assign(
    spec: ModelSpec, samples: Sequence[TokenSample], ranks: int, share: bool
) -> tuple[list[list[int]], list[float]]:
    """(indices, cost) of each data rank. With shared prompts a group stays together, unless the most loaded rank would
    have less to do otherwise."""
    costs = [sample_cost(spec, len(sample.ids)) for sample in samples]
    apart = balanced_partition(costs, ranks)
    if not share:
        return apart, [sum(costs[i] for i in part) for part in apart]
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, sample in enumerate(samples):
        groups.setdefault(sample.prefix, []).append(i)
    prompt_costs = {prefix: sample_cost(spec, len(prefix)) for prefix in groups}

    def load(part: Sequence[int]) -> float:
        here = Counter(samples[i].prefix for i in part)
        saved = sum((count - 1) * prompt_costs[prefix] for prefix, count in here.items())
        return sum(costs[i] for i in part) - saved

    members = list(groups.values())
    whole = balanced_partition([load(part) for part in members], ranks)
    together = [sorted(i for g in part for i in members[g]) for part in whole]
    best = min((together, apart), key=lambda shares: max(load(part) for part in shares))
    return best, [load(part) for part in best]
