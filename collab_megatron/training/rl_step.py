"""One RL update on one data rank's share: reference log-probs, then the optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence

from collab_megatron.actor.actor import Actor
from collab_megatron.algorithms.grpo_step import make_grpo_loss, mini_batches, token_sample, with_values
from collab_megatron.batching import MicroBatch, empty_like, split_by_tokens
from collab_megatron.batching.balance import balanced_shares
from collab_megatron.config.sections import AlgorithmSection
from collab_megatron.monitor.timers import PhaseTimer
from collab_megatron.types import RolloutBatch, TrainingSample

PAD_ID = 0
"""Any valid id: padding stands right of the tokens, masked and unseen by causal attention."""


def my_micro_batches(actor: Actor, samples: Sequence[TrainingSample], micro_batch_tokens: int) -> list[MicroBatch]:
    """This data rank's share of `samples`; one batch that trains nothing if the share is empty."""
    grid = actor.grid
    shares = balanced_shares([sample.num_tokens for sample in samples], grid.dp_size)
    mine = [token_sample(samples[i]) for i in shares[grid.dp_rank]]
    cut = {"micro_batch_tokens": micro_batch_tokens, "pad_id": PAD_ID, "pad_multiple": grid.pad_multiple}
    if mine:
        return split_by_tokens(mine, **cut)
    return [empty_like(split_by_tokens([token_sample(samples[0])], **cut)[0])]


def update(
    actor: Actor,
    reference: Actor | None,
    batch: RolloutBatch,
    *,
    algorithm: AlgorithmSection,
    micro_batch_tokens: int,
    timer: PhaseTimer,
) -> dict[str, float]:
    """Train on `batch`; metrics by dashboard name, means over trained tokens, equal on every rank.

    With several mini-batches the figures are those of their mean, except lr (the last) and grad_norm (the largest).
    """
    parts = mini_batches(batch.samples, algorithm.mini_batches)
    prepared: list[tuple[list[MicroBatch], int]] = []
    with timer("logprobs"):
        for part in parts:
            micro = my_micro_batches(actor, part, micro_batch_tokens)
            if reference is not None:
                micro = _attach(micro, "ref_logprobs", reference)
            if len(parts) > 1:
                micro = _attach(micro, "old_logprobs", actor)
            prepared.append((micro, sum(len(sample.reply_ids_T) for sample in part)))
    loss_fn = make_grpo_loss(algorithm)
    with timer("update"):
        results = [actor.train_step(micro, loss_fn, normalizer=tokens) for micro, tokens in prepared]
    names = results[0].metrics
    metrics = {f"train/{name}": sum(r.metrics[name] for r in results) / len(results) for name in names}
    metrics["train/grad_norm"] = max(result.grad_norm for result in results)
    metrics["train/lr"] = results[-1].lr
    metrics["train/steps_skipped"] = sum(result.skipped for result in results)
    metrics["train/tokens"] = sum(sample.num_tokens for sample in batch.samples)
    return metrics


def _attach(micro_batches: list[MicroBatch], name: str, model: Actor) -> list[MicroBatch]:
    logprobs, _ = model.logprobs(micro_batches)
    return [with_values(batch, name, values) for batch, values in zip(micro_batches, logprobs, strict=True)]
