"""One update of online DPO on this rank: reference log-probs, then optimizer steps on the driver's pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from collab_megatron.config.sections import TrainSection
from collab_megatron.errors import RunError
from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.batching import MicroBatch, TokenSample, units_of
from collab_megatron.trainer.loss.dpo import PAIR, make_dpo_loss, means_of_pairs, with_preference
from collab_megatron.trainer.loss.losses import LossSum
from collab_megatron.trainer.loss.policy_step import ENGINE_GAP, engine_gap, mini_batches, token_sample
from collab_megatron.trainer.rank_batch import LogprobModel, attach_logprobs, rank_batch
from collab_megatron.trainer.report.timers import PhaseTimer
from collab_megatron.trainer.rl_step import step_metrics, without_samples
from collab_megatron.trainer.skipped_steps import SkippedSteps
from collab_megatron.types import RolloutBatch, TrainingSample

Pair = tuple[TrainingSample, TrainingSample]
"""Chosen, rejected."""


def update_on_pairs(
    actor: Actor,
    reference: LogprobModel,
    batch: RolloutBatch,
    *,
    beta: float,
    mini_batch_count: int,
    train: TrainSection,
    timer: PhaseTimer,
    skipped: SkippedSteps,
) -> dict[str, float]:
    """As rl_step.update, with metrics over pairs. A batch without pairs takes no optimizer step and is counted.

    Raises RunError if the samples are not pairs.
    """
    if not batch.samples:
        return without_samples(actor.lr, timer)
    parts = mini_batches(pairs_of(batch), mini_batch_count)
    prepared: list[tuple[list[MicroBatch], int, int]] = []  # micro-batches, pairs and trained tokens of all ranks
    imbalance, flops = 1.0, 0.0
    with timer("logprobs"):
        for part in parts:
            mine = rank_batch(actor.grid, actor.spec, pair_tokens(part, batch.step), train, unit=PAIR)
            imbalance = max(imbalance, mine.imbalance)
            flops += mine.forward_flops * 4  # the reference, and a backward pass is twice a forward pass
            micro = attach_logprobs(mine.micro_batches, "ref_logprobs", reference)
            prepared.append((micro, len(part), sum(len(sample.reply_ids_T) for pair in part for sample in pair)))
    loss_fn = make_online_loss(beta)
    with timer("update"):
        results = [actor.train_step(micro, loss_fn, normalizer=pairs) for micro, pairs, _ in prepared]
    means = [
        means_of_pairs(result.metrics, pairs=pairs, tokens=tokens)
        for result, (_, pairs, tokens) in zip(results, prepared, strict=True)
    ]
    # no log-probs of the start of the step are kept: after the first optimizer step they are those of another policy
    with_engine = {name: means[0][name] for name in ENGINE_GAP}
    means = [{**each, **with_engine} for each in means]
    return step_metrics(
        results,
        means,
        computed=sum(len(sample.prompt_ids) + len(sample.reply_ids_T) for sample in batch.samples),
        trained=sum(tokens for _, _, tokens in prepared),
        imbalance=imbalance,
        flops=flops,
        skipped=skipped,
    )


def pairs_of(batch: RolloutBatch) -> list[Pair]:
    """The batch's pairs. Raises RunError if it has other samples: its driver runs with another config."""
    samples = batch.samples
    try:
        pairs = [(samples[i], samples[j]) for i, j in units_of(len(samples), PAIR)]
    except ValueError:
        pairs = []
    if not pairs or any(
        chosen.prompt_ids != rejected.prompt_ids or chosen.reward <= rejected.reward for chosen, rejected in pairs
    ):
        raise RunError(
            f"the batch of step {batch.step + 1} with {len(samples)} samples has no pairs of a chosen and a rejected "
            "reply: report this bug, and resume"
        )
    return pairs


def pair_tokens(pairs: Sequence[Pair], version: int) -> list[TokenSample]:
    """Token samples of the pairs, chosen and rejected in turn. version: of the weights that are trained now."""
    return [
        with_preference(token_sample(sample, version, [sample.advantage] * len(sample.reply_ids_T)), number, sign)
        for number, pair in enumerate(pairs)
        for sample, sign in zip(pair, (1, -1), strict=True)
    ]


def make_online_loss(beta: float) -> Callable[[Tensor, MicroBatch], LossSum]:
    """The DPO loss, with the comparison of the engine's log-probs with the trainer's, which holds before the first
    optimizer step."""
    dpo = make_dpo_loss(beta)

    def loss(logprobs: Tensor, batch: MicroBatch) -> LossSum:
        total = dpo(logprobs, batch)
        return replace(total, metrics={**total.metrics, **engine_gap(logprobs.detach(), batch)})

    return loss
