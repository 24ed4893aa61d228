"""One RL update of this rank: reference log-probs, then the optimizer steps."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from collab_megatron.config.sections import AlgorithmSection, TrainSection
from collab_megatron.trainer.actor.actor import Actor, StepResult
from collab_megatron.trainer.actor.agreement import gather
from collab_megatron.trainer.actor.grid import RankGrid
from collab_megatron.trainer.batching import MicroBatch
from collab_megatron.trainer.batching.merged_turns import merge_turns
from collab_megatron.trainer.loss.kl import kl_estimate
from collab_megatron.trainer.loss.policy_step import (
    make_policy_loss,
    mini_batches,
    token_samples,
    with_advantages,
    with_values,
)
from collab_megatron.trainer.rank_batch import LogprobModel, attach_logprobs, rank_batch
from collab_megatron.trainer.report.timers import PhaseTimer
from collab_megatron.trainer.skipped_steps import SkippedSteps, largest_norm
from collab_megatron.trainer.step_advantages import step_advantages
from collab_megatron.types import RolloutBatch, TrainingSample

Part = tuple[list[MicroBatch], int]  # of an optimizer step: this rank's micro-batches, trained tokens of all ranks


def update(
    actor: Actor,
    reference: LogprobModel | None,
    batch: RolloutBatch,
    *,
    algorithm: AlgorithmSection,
    train: TrainSection,
    timer: PhaseTimer,
    skipped: SkippedSteps,
    longest_reply: int,
) -> dict[str, float]:
    """Train on `batch`; returns metrics by dashboard name, means over trained tokens, equal on every rank.

    longest_reply: tokens that a reply may have (rollout.max_new_tokens), for algorithm.aggregation: constant.

    With several mini-batches a metric is their mean, except lr (the last), grad_norm, dp_imbalance and names that end
    in _max (the largest). A batch without samples (algorithm.zero_advantage: drop) takes no optimizer step and is
    counted; weights and learning-rate schedule stay as they are.
    """
    if not batch.samples:
        return without_samples(actor.lr, timer)
    parts = mini_batches(batch.samples, algorithm.mini_batches)
    compares = len(parts) > 1 or algorithm.kl_in_reward  # with the policy at the start of the step
    prepared: list[Part] = []
    imbalance, flops, computed = 1.0, 0.0, 0
    forward_passes = (reference is not None) + compares
    advantages = iter(step_advantages(batch.samples, algorithm))
    with timer("logprobs"):
        for part in parts:
            samples = token_samples(
                part,
                list(itertools.islice(advantages, len(part))),
                algorithm,
                version=batch.step,
                longest=longest_reply,
            )
            if algorithm.merges_turns:
                samples = merge_turns(samples)
            computed += sum(len(sample.ids) for sample in samples)
            mine = rank_batch(actor.grid, actor.spec, samples, train)
            imbalance = max(imbalance, mine.imbalance)
            flops += mine.forward_flops * (forward_passes + 3)  # a backward pass is twice a forward pass
            micro = mine.micro_batches
            if algorithm.reduces_over_replies:
                micro = [with_values(each, "sequence", each.numbered()) for each in micro]
            if reference is not None:
                micro = attach_logprobs(micro, "ref_logprobs", reference)
            if compares:
                micro = attach_logprobs(micro, "old_logprobs", actor)
            prepared.append((micro, sum(len(sample.reply_ids_T) for sample in part)))
        if algorithm.kl_in_reward:
            prepared = _with_kl_in_reward(actor.grid, parts, prepared, algorithm)
    loss_fn = make_policy_loss(algorithm, actor.grid.sum_over_context)
    with timer("update"):
        results = [actor.train_step(micro, loss_fn, normalizer=tokens) for micro, tokens in prepared]
    means = [result.metrics for result in results]
    trained = sum(tokens for _, tokens in prepared)
    return step_metrics(
        results, means, computed=computed, trained=trained, imbalance=imbalance, flops=flops, skipped=skipped
    )


def without_samples(lr: float, timer: PhaseTimer) -> dict[str, float]:
    """The metrics of a step that trains nothing. lr: of the next step."""
    for phase in ("logprobs", "update"):
        with timer(phase):
            pass  # the dashboard shows both phases at every step
    idle = {"steps_without_samples": 1.0, "steps_skipped": 0.0, "tokens": 0.0, "trained_tokens": 0.0, "lr": lr}
    return {f"train/{name}": value for name, value in idle.items()}


def step_metrics(
    results: Sequence[StepResult],
    means: Sequence[Mapping[str, float]],
    *,
    computed: int,
    trained: int,
    imbalance: float,
    flops: float,
    skipped: SkippedSteps,
) -> dict[str, float]:
    """The metrics of `update` from its optimizer steps and the means of each step's metrics.

    computed, trained: tokens of all sequences of the step, and those of the policy turns that are trained.
    """
    metrics = {f"train/{name}": sum(each[name] for each in means) / len(means) for name in means[0]}
    metrics |= {f"train/{name}": max(r.largest[name] for r in results) for name in results[0].largest}
    on_policy = metrics["train/on_policy_share"]
    gap = metrics.pop("train/on_policy_gap")  # a sum over on-policy tokens, divided by all tokens
    if on_policy:
        metrics["train/on_policy_gap"] = gap / on_policy
    if (squared := metrics.pop("train/importance_weight_squared", 0.0)) > 0:
        # Kish's effective sample size per token: 1 where all weights are equal
        metrics["train/importance_effective_share"] = metrics["train/importance_weight"] ** 2 / squared
    metrics["train/grad_norm"] = largest_norm(results)
    metrics["train/lr"] = results[-1].lr
    metrics["train/steps_without_samples"] = 0.0
    metrics["train/steps_skipped"] = sum(result.skipped for result in results)
    metrics["train/skipped_in_a_row"] = skipped.count(results)
    metrics["train/tokens"] = computed
    metrics["train/trained_tokens"] = trained
    metrics["train/dp_imbalance"] = imbalance
    metrics["train/model_tflop"] = flops / 1e12
    return metrics


def _with_kl_in_reward(
    grid: RankGrid, parts: Sequence[Sequence[TrainingSample]], prepared: Sequence[Part], algorithm: AlgorithmSection
) -> list[Part]:
    """The micro-batches with the advantages of rewards from which the KL is subtracted. Collective: a group's replies
    may be on several data ranks."""
    kl: dict[tuple[int, int], list[float]] = {}  # (part, sample) of this data rank -> [T]
    for number, (micro, _) in enumerate(prepared):
        for batch in micro:
            old, reference = batch.values["old_logprobs"], batch.values["ref_logprobs"]
            estimates = batch.per_sample(kl_estimate(old, reference, algorithm.kl_estimator))
            for index, estimate_T in zip(batch.sample_indices, estimates, strict=True):
                reply = len(parts[number][index].reply_ids_T)
                kl[number, index] = estimate_T[len(estimate_T) - reply :].tolist()
    every = {place: values for ranks in gather(grid, kl) for place, values in ranks.items()}
    samples = [sample for part in parts for sample in part]
    kl_N_T = [every[number, index] for number, part in enumerate(parts) for index in range(len(part))]
    advantages = iter(step_advantages(samples, algorithm, kl_N_T))
    found = []
    for part, (micro, tokens) in zip(parts, prepared, strict=True):
        of_part = list(itertools.islice(advantages, len(part)))
        found.append(([with_advantages(batch, of_part) for batch in micro], tokens))
    return found
