"""The GRPO step's inputs from a rollout batch: token samples, mini-batches, loss function. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from collab_megatron.config.sections import AlgorithmSection
from collab_megatron.trainer.batching.micro_batch import MicroBatch, TokenSample
from collab_megatron.trainer.loss.losses import LossSum, grpo_loss
from collab_megatron.types import TrainingSample

T = TypeVar("T")


def token_sample(sample: TrainingSample, version: int) -> TokenSample:
    """Prompt and reply as one sequence, of which the reply is trained. version: of the weights that are trained now."""
    before, reply = len(sample.prompt_ids), len(sample.reply_ids_T)
    # a reply that continued across a weight update has a cache of the older weights under its later tokens
    on_policy = float(set(sample.versions_T) == {version})
    return TokenSample(
        ids=[*sample.prompt_ids, *sample.reply_ids_T],
        mask=[0.0] * before + [1.0] * reply,
        values={
            "advantages": [0.0] * before + [sample.advantage] * reply,
            "rollout_logprobs": [0.0] * before + list(sample.rollout_logprobs_T),
            "on_policy": [0.0] * before + [on_policy] * reply,
        },
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


def make_grpo_loss(algorithm: AlgorithmSection) -> Callable[[Tensor, MicroBatch], LossSum]:
    """The loss of a micro-batch. Without "old_logprobs" the policy itself is taken as the policy at the start of the
    step, which is exact for one optimizer step per batch and saves a forward pass. Without "ref_logprobs" there is no
    KL.
    """

    def loss(logprobs: Tensor, batch: MicroBatch) -> LossSum:
        old = batch.values.get("old_logprobs", logprobs.detach())
        rollout = batch.values["rollout_logprobs"]
        total = grpo_loss(
            logprobs,
            old_logprobs=old,
            rollout_logprobs=rollout,
            ref_logprobs=batch.values.get("ref_logprobs"),
            advantages=batch.values["advantages"],
            mask=batch.mask,
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            kl_coef=algorithm.kl_coef,
            importance_cap=algorithm.importance_cap,
            clip_dual=algorithm.clip_dual,
        )
        return replace(total, metrics={**total.metrics, **engine_gap(old, batch)})

    return loss


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
