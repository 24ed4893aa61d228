"""Division of a global batch: the samples of this data rank, in micro-batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from collab_megatron.config.sections import TrainSection
from collab_megatron.model.flops import sample_cost, token_flops
from collab_megatron.model.spec import ModelSpec
from collab_megatron.trainer.actor.grid import RankGrid
from collab_megatron.trainer.batching import MicroBatch, TokenSample, idle_like, split_by_tokens, units_of
from collab_megatron.trainer.batching.partition import balanced_partition
from collab_megatron.trainer.loss.policy_step import with_values

PAD_ID = 0
"""Any valid id: padding is right of the tokens, masked, and unseen by causal attention."""


@dataclass(frozen=True)
class RankBatch:
    """One data rank's part of a global batch."""

    # at least one; with fewer samples than ranks it may train nothing. sample_indices are those of the global batch
    micro_batches: list[MicroBatch]
    imbalance: float  # cost of the most loaded data rank / mean; 1 is even. The same on every rank
    forward_flops: float = 0.0  # of one pass over the global batch; prompts count where they are computed


def rank_batch(
    grid: RankGrid, spec: ModelSpec, samples: Sequence[TokenSample], train: TrainSection, *, unit: int = 1
) -> RankBatch:
    """Divide `samples` over the data ranks, balanced by FLOPs (with attention's quadratic part); return this rank's.

    unit: consecutive samples that stay in one micro-batch, with equal prefixes (2: pairs).
    """
    share_prompts = _can_share_prompts(grid, samples, train)
    parts, loads = _divide(spec, samples, units_of(len(samples), unit), grid.dp_size, share_prompts)
    mine = [samples[i] for i in parts[grid.dp_rank]]
    micro_batches = split_by_tokens(
        mine or samples[:unit],
        micro_batch_tokens=train.micro_batch_tokens,
        pad_id=PAD_ID,
        pad_multiple=grid.pad_multiple,
        packed=train.packing,
        share=share_prompts,
        unit=unit,
    )
    if mine:
        global_indices = parts[grid.dp_rank]
        micro_batches = [
            replace(batch, sample_indices=tuple(global_indices[i] for i in batch.sample_indices))
            for batch in micro_batches
        ]
    else:
        micro_batches = [idle_like(micro_batches[0], grid.pad_multiple)]
    return RankBatch(
        micro_batches,
        imbalance=max(loads) * len(loads) / sum(loads),
        forward_flops=sum(loads) * token_flops(spec),
    )


class LogprobModel(Protocol):
    """The actor, or a reference of either kind."""

    def logprobs(self, micro_batches: Sequence[MicroBatch]) -> tuple[list[Tensor], list[Tensor]]: ...


def attach_logprobs(micro_batches: Sequence[MicroBatch], name: str, model: LogprobModel) -> list[MicroBatch]:
    """The micro-batches with the log-probs of `model` as another value. Collective as Actor.logprobs."""
    logprobs, _ = model.logprobs(micro_batches)
    return [with_values(batch, name, found) for batch, found in zip(micro_batches, logprobs, strict=True)]


def _can_share_prompts(grid: RankGrid, samples: Sequence[TokenSample], train: TrainSection) -> bool:
    """Whether this layout allows shared prompts and any samples have equal ones; the same on every rank."""
    if not train.share_prompts or grid.cp_size > 1 or grid.backend.name == "cuda":  # on these it is not tried yet
        return False
    prefixes = [sample.prefix for sample in samples if sample.shareable]
    return len(set(prefixes)) < len(prefixes)


def _divide(
    spec: ModelSpec, samples: Sequence[TokenSample], units: Sequence[list[int]], ranks: int, share_prompts: bool
) -> tuple[list[list[int]], list[float]]:
    """(indices, cost) of each data rank. With shared prompts a group stays on one rank, unless dividing it makes the
    most loaded rank faster."""
    costs = [sample_cost(spec, len(sample.ids), int(sum(sample.mask[1:]))) for sample in samples]
    alone = balanced_partition([sum(costs[i] for i in unit) for unit in units], ranks)
    apart = [[i for u in part for i in units[u]] for part in alone]
    if not share_prompts:
        return apart, [sum(costs[i] for i in part) for part in apart]
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, sample in enumerate(samples):
        groups.setdefault(sample.prefix, []).append(i)
    prompt_costs = {prefix: sample_cost(spec, len(prefix), trained=0) for prefix in groups}

    def load(part: Sequence[int]) -> float:
        here = Counter(samples[i].prefix for i in part)
        saved = sum((count - 1) * prompt_costs[prefix] for prefix, count in here.items())
        return sum(costs[i] for i in part) - saved

    members = list(groups.values())
    whole = balanced_partition([load(part) for part in members], ranks)
    together = [sorted(i for g in part for i in members[g]) for part in whole]
    best = min((together, apart), key=lambda parts: max(load(part) for part in parts))
    return best, [load(part) for part in best]
