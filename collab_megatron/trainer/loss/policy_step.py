"""The policy step's inputs from a rollout batch: token samples, mini-batches, loss function. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from collab_megatron.config.sections import AlgorithmSection
from collab_megatron.trainer.batching.micro_batch import MicroBatch, TokenSample
from collab_megatron.trainer.loss.losses import LossSum, policy_loss
from collab_megatron.trainer.loss.sequences import Reduce, Sequences, mean_weights, on_this_rank
from collab_megatron.types import TrainingSample

T = TypeVar("T")


def token_samples(
    samples: Sequence[TrainingSample],
    advantages_N_T: Sequence[Sequence[float]],
    algorithm: AlgorithmSection,
    *,
    version: int,
    longest: int,
) -> list[TokenSample]:
    """The samples of one optimizer step, of all ranks. version: of the weights that are trained now. longest: tokens
    that a reply may have."""
    lengths = [len(sample.reply_ids_T) for sample in samples]
    weights: Sequence[float | None] = [None] * len(samples)
    if algorithm.aggregation != "token_mean":
        weights = mean_weights(lengths, algorithm.aggregation, longest=longest)
    return [
        token_sample(sample, version, advantages_T, weight)
        for sample, advantages_T, weight in zip(samples, advantages_N_T, weights, strict=True)
    ]


def token_sample(
    sample: TrainingSample, version: int, advantages_T: Sequence[float], weight: float | None = None
) -> TokenSample:
    """Prompt and reply as one sequence, of which the reply is trained. weight: of each token in the mean; None: 1."""
    before, reply = len(sample.prompt_ids), len(sample.reply_ids_T)
    # a reply that continued across a weight update has a cache of the older weights under its later tokens
    on_policy = float(set(sample.versions_T) == {version})
    values = {
        "advantages": [0.0] * before + list(advantages_T),
        "rollout_logprobs": [0.0] * before + list(sample.rollout_logprobs_T),
        "on_policy": [0.0] * before + [on_policy] * reply,
    }
    if weight is not None:
        values["weights"] = [0.0] * before + [weight] * reply
    return TokenSample(
        ids=[*sample.prompt_ids, *sample.reply_ids_T],
        mask=[0.0] * before + [1.0] * reply,
        values=values,
        shareable=max(0, before - 1),
    )


def mini_batches(samples: Sequence[T], count: int) -> list[list[T]]:
    """`count` consecutive parts of nearly equal size, none empty; groups stay together as far as the sizes allow.

    Raises ValueError without samples.
    """
    if not samples:
        raise ValueError("there are no samples to split")
    count = min(count, len(samples))
    bounds = [round(i * len(samples) / count) for i in range(count + 1)]
    return [list(samples[a:b]) for a, b in itertools.pairwise(bounds)]


def with_values(batch: MicroBatch, name: str, values: Tensor) -> MicroBatch:
    """The batch with another per-token tensor [B, S]."""
    return replace(batch, values={**batch.values, name: values})


def with_advantages(batch: MicroBatch, advantages_N_T: Sequence[Sequence[float]]) -> MicroBatch:
    """The batch with other advantages; entry i of the argument belongs to the reply of sample i of the list that was
    split."""
    advantages = torch.zeros_like(batch.values["advantages"])
    for index, (row, columns) in zip(batch.sample_indices, batch.spans(), strict=True):
        values_T = torch.tensor(advantages_N_T[index], dtype=advantages.dtype)
        advantages[row, columns.stop - len(values_T) : columns.stop] = values_T
    return with_values(batch, "advantages", advantages)


def make_policy_loss(
    algorithm: AlgorithmSection, reduce: Reduce = on_this_rank
) -> Callable[[Tensor, MicroBatch], LossSum]:
    """The loss of a micro-batch. Without "old_logprobs" the policy itself is taken as the policy at the start of the
    step, which is exact for one optimizer step per batch and saves a forward pass. Without "ref_logprobs" there is no
    KL. reduce: the sum over the context ranks, where replies are divided among them.
    """

    def loss(logprobs: Tensor, batch: MicroBatch) -> LossSum:
        values = batch.values
        old = values.get("old_logprobs", logprobs.detach())
        rollout = values["rollout_logprobs"]
        sequences = None
        if algorithm.reduces_over_replies:
            sequences = Sequences(values["sequence"].long(), max(1, len(batch.sample_indices)), reduce)
        total = policy_loss(
            logprobs,
            old_logprobs=old,
            rollout_logprobs=rollout,
            ref_logprobs=values.get("ref_logprobs"),
            advantages=values["advantages"],
            mask=batch.mask,
            algorithm=algorithm,
            sequences=sequences,
            weights=values.get("weights"),
            entropy=values.get("entropy"),
        )
        return replace(total, metrics={**total.metrics, **engine_gap(old, batch)})

    return loss


ENGINE_GAP = ("logprob_gap", "on_policy_share", "on_policy_gap")
"""Metrics of engine_gap."""


def engine_gap(old_logprobs: Tensor, batch: MicroBatch) -> dict[str, Tensor]:
    """How far the engine's log-probs are from the trainer's at the start of the step, as sums over trained tokens."""
    gap = ((old_logprobs - batch.values["rollout_logprobs"]).abs() * batch.mask).detach()
    # only for tokens of the newest weights: otherwise the gap includes the policy's own change since then
    on_policy = batch.values.get("on_policy", batch.mask) * batch.mask
    return {
        "logprob_gap": torch.sum(gap),
        "on_policy_share": torch.sum(on_policy),
        "on_policy_gap": torch.sum(gap * on_policy),
    }
