"""One RL update of this rank: reference log-probs, then the optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from collab_megatron.config.sections import AlgorithmSection, TrainSection
from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.batching import MicroBatch
from collab_megatron.trainer.batching.merged_turns import merge_turns
from collab_megatron.trainer.loss.grpo_step import make_grpo_loss, mini_batches, token_sample, with_values
from collab_megatron.trainer.rank_batch import rank_batch
from collab_megatron.trainer.report.timers import PhaseTimer
from collab_megatron.trainer.skipped_steps import SkippedSteps, largest_norm
from collab_megatron.types import RolloutBatch


class LogprobModel(Protocol):
    """The actor, or a reference of either kind."""

    def logprobs(self, micro_batches: Sequence[MicroBatch]) -> tuple[list[Tensor], list[Tensor]]: ...


def update(
    actor: Actor,
    reference: LogprobModel | None,
    batch: RolloutBatch,
    *,
    algorithm: AlgorithmSection,
    train: TrainSection,
    timer: PhaseTimer,
    skipped: SkippedSteps,
) -> dict[str, float]:
    """Train on `batch`; returns metrics by dashboard name, means over trained tokens, equal on every rank.

    With several mini-batches a metric is their mean, except lr (the last), grad_norm, dp_imbalance and names that end
    in _max (the largest). A batch without samples (algorithm.zero_advantage: drop) takes no optimizer step and is
    counted; weights and learning-rate schedule stay as they are.
    """
    if not batch.samples:
        for phase in ("logprobs", "update"):
            with timer(phase):
                pass  # the dashboard shows both phases at every step
        idle = {
            "steps_without_samples": 1.0,
            "steps_skipped": 0.0,
            "tokens": 0.0,
            "trained_tokens": 0.0,
            "lr": actor.lr,
        }
        return {f"train/{name}": value for name, value in idle.items()}
    parts = mini_batches(batch.samples, algorithm.mini_batches)
    prepared: list[tuple[list[MicroBatch], int]] = []
    imbalance, flops, computed = 1.0, 0.0, 0
    forward_passes = (reference is not None) + (len(parts) > 1)
    with timer("logprobs"):
        for part in parts:
            samples = [token_sample(sample, batch.step) for sample in part]
            if algorithm.credit == "tree":
                samples = merge_turns(samples)
            computed += sum(len(sample.ids) for sample in samples)
            mine = rank_batch(actor.grid, actor.spec, samples, train)
            imbalance = max(imbalance, mine.imbalance)
            flops += mine.forward_flops * (forward_passes + 3)  # a backward pass is twice a forward pass
            micro = mine.micro_batches
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
    metrics |= {f"train/{name}": max(r.largest[name] for r in results) for name in results[0].largest}
    on_policy = metrics["train/on_policy_share"]
    gap = metrics.pop("train/on_policy_gap")  # a sum over on-policy tokens, divided by all tokens
    if on_policy:
        metrics["train/on_policy_gap"] = gap / on_policy
    metrics["train/grad_norm"] = largest_norm(results)
    metrics["train/lr"] = results[-1].lr
    metrics["train/steps_without_samples"] = 0.0
    metrics["train/steps_skipped"] = sum(result.skipped for result in results)
    metrics["train/skipped_in_a_row"] = skipped.count(results)
    metrics["train/tokens"] = computed
    metrics["train/trained_tokens"] = sum(tokens for _, tokens in prepared)
    metrics["train/dp_imbalance"] = imbalance
    metrics["train/model_tflop"] = flops / 1e12
    return metrics


def _attach(micro_batches: list[MicroBatch], name: str, model: LogprobModel) -> list[MicroBatch]:
    logprobs, _ = model.logprobs(micro_batches)
    return [with_values(batch, name, values) for batch, values in zip(micro_batches, logprobs, strict=True)]
