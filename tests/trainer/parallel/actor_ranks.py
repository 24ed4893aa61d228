"""Run by test_actor_parallel.py on four ranks (tensor 2, pipeline 2): checks of the actor besides layout_ranks.py.

actor_ranks.py WORK
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from collab_megatron.config.sections import AlgorithmSection, ParallelSection, TrainSection
from collab_megatron.errors import WeightsNotFinite
from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.actor.agreement import gather
from collab_megatron.trainer.actor.grid import RankGrid, close_grid, init_grid
from collab_megatron.trainer.actor.reference import SwappedReference, build_reference
from collab_megatron.trainer.batching.micro_batch import MicroBatch, collate, split_by_tokens
from collab_megatron.trainer.loss.losses import LossSum
from collab_megatron.trainer.loss.policy_step import token_sample
from collab_megatron.trainer.report.timers import PhaseTimer
from collab_megatron.trainer.rl_step import update
from collab_megatron.trainer.skipped_steps import SkippedSteps
from collab_megatron.types import RolloutBatch, TrainingSample
from tests.trainer.parallel.plain import OPTIMIZER, STEPS, loss_fn
from tests.trainer.parallel.tiny import make_samples


def batches_of(count: int, grid: RankGrid, *, packed: bool = False) -> list[MicroBatch]:
    samples = make_samples(count)
    return split_by_tokens(samples, micro_batch_tokens=60, pad_id=0, pad_multiple=grid.pad_multiple, packed=packed)


def weights(actor: Actor) -> list[Tensor]:
    return [parameter.detach().clone() for chunk in actor.chunks for parameter in chunk.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def check_skip(folder: Path, grid: RankGrid) -> None:
    """A gradient that is not finite changes nothing, on any rank, though only some ranks see it."""
    actor = Actor.build(folder, dtype="float32", grid=grid, optimizer=OPTIMIZER, total_steps=STEPS)
    before, lr = weights(actor), actor.lr

    def poisoned(logprobs: Tensor, batch: MicroBatch) -> LossSum:
        return LossSum(loss=(logprobs * batch.mask).sum() * float("nan"), metrics={})

    assert actor.train_step(batches_of(2, grid), poisoned, 10).skipped
    assert actor.lr == lr
    assert same(before, weights(actor))
    assert not actor.train_step(batches_of(2, grid), loss_fn, 10).skipped


def check_ruined(folder: Path, grid: RankGrid) -> None:
    """Weights that an optimizer step makes infinite are refused on every rank; a NaN on one rank is known to all."""
    actor = Actor.build(folder, dtype="float32", grid=grid, optimizer=OPTIMIZER, total_steps=STEPS)
    assert actor.not_finite() is None
    if grid.rank == grid.world_size - 1:
        list(actor.chunks[-1].parameters())[-1].data.view(-1)[-1] = torch.nan
    said = gather(grid, actor.not_finite())
    assert len(set(said)) == 1
    assert said[0] is not None
    actor = Actor.build(folder, dtype="float32", grid=grid, optimizer=OPTIMIZER, total_steps=STEPS)
    assert actor.optimizer is not None
    for group in actor.optimizer.param_groups:
        group.update(lr=1e37, weight_decay=100.0)
    with pytest.raises(WeightsNotFinite, match="lr 1e\\+37"):
        actor.train_step(batches_of(2, grid), loss_fn, 10)


def check_no_samples(folder: Path, grid: RankGrid) -> None:
    """A batch that came out empty is counted; weights and schedule stay, and the next batch trains."""
    actor = Actor.build(folder, dtype="float32", grid=grid, optimizer=OPTIMIZER, total_steps=STEPS)
    before, lr = weights(actor), actor.lr
    sample = TrainingSample((1, 2), (3, 4), (-0.5, -0.25), (0, 0), 1.0)
    timer, phases = PhaseTimer(), []
    found = []
    for samples in ((), (sample,)):
        batch, algorithm = RolloutBatch(0, samples, {}), AlgorithmSection(mini_batches=2)
        skipped = SkippedSteps(3)
        found.append(
            update(
                actor,
                None,
                batch,
                algorithm=algorithm,
                train=TrainSection(),
                timer=timer,
                skipped=skipped,
                longest_reply=8,
            )
        )
        phases.append(set(timer.drain()))
    assert phases[0] == phases[1]
    assert [figures["train/steps_without_samples"] for figures in found] == [1, 0]
    assert [figures["train/tokens"] for figures in found] == [0, 4]
    assert [figures["train/lr"] for figures in found] == [lr, lr]
    assert not same(before, weights(actor))


def check_bf16(folder: Path, grid: RankGrid) -> None:
    """bf16 trains through fp32 master weights, and its log-probs stay near those of fp32."""
    batches = batches_of(4, grid)
    exact = Actor.build(folder, dtype="float32", grid=grid, optimizer=None).logprobs(batches)[0]
    actor = Actor.build(folder, dtype="bfloat16", grid=grid, optimizer=OPTIMIZER, total_steps=STEPS)
    for batch, rounded, wanted in zip(batches, actor.logprobs(batches)[0], exact, strict=True):
        assert rounded.dtype == torch.float32
        assert ((rounded - wanted) * batch.mask).abs().mean() < 0.05
    losses = [
        actor.train_step(batches, lambda lp, b: LossSum(-(lp * b.mask).sum(), {}), 40.0).metrics["loss"]
        for _ in range(3)
    ]
    assert losses[2] < losses[0], losses


def check_references(folder: Path, grid: RankGrid) -> None:
    """A second model and swapped weights give the same log-probs after training, and swapping leaves no trace."""
    actor = Actor.build(folder, dtype="float32", grid=grid, optimizer=OPTIMIZER, total_steps=STEPS)
    batches = batches_of(6, grid, packed=True)
    model = build_reference(actor, "model", logits_chunk_mb=64)
    swap = build_reference(actor, "swap", logits_chunk_mb=64)
    assert isinstance(model, Actor)
    assert isinstance(swap, SwappedReference)
    first = actor.logprobs(batches)[0]
    actor.train_step(batches, loss_fn, 40.0)
    trained, own = weights(actor), actor.logprobs(batches)[0]
    assert not same(first, own)
    assert same(swap.logprobs(batches)[0], first)
    assert same(model.logprobs(batches)[0], first)
    assert same(weights(actor), trained)
    assert same(actor.logprobs(batches)[0], own)


def check_kl_in_reward(folder: Path, grid: RankGrid) -> None:
    """The rewards of a step minus the KL of each reply, from log-probs of policy and reference, decide its loss."""
    actor = Actor.build(folder, dtype="float32", grid=grid, optimizer=OPTIMIZER, total_steps=STEPS)
    algorithm = AlgorithmSection(preset="dr_grpo", kl_in="reward", kl_estimator="k2", kl_coef=0.5, importance="none")
    reference = build_reference(actor, algorithm, logits_chunk_mb=64)
    assert reference is not None
    for _ in range(2):
        actor.train_step(batches_of(6, grid), loss_fn, 40.0)
    lengths, longest = (2, 5, 3, 4), 8
    samples = [
        TrainingSample((1, 2), tuple(range(7, 7 + n)), (0.0,) * n, (0,) * n, 0.0, reward=n / 10, group=f"{n > 3}")
        for n in lengths
    ]
    tokens = [token_sample(sample, 0, [0.0] * n) for sample, n in zip(samples, lengths, strict=True)]
    batch = collate(tokens, tuple(range(4)), 0, grid.pad_multiple, packed=False)
    policy, before = (model.logprobs([batch])[0][0] for model in (actor, reference))
    kl_N = [values.sum().item() for values in batch.per_sample((policy - before).square() / 2 * batch.mask)]
    assert max(kl_N) > 1e-4
    rewards = [sample.reward - 0.5 * kl for sample, kl in zip(samples, kl_N, strict=True)]
    first, second = (rewards[1] - rewards[3]) / 2, (rewards[0] - rewards[2]) / 2
    wanted = -(5 * first - 4 * first + 2 * second - 3 * second) / (4 * longest)
    found = update(
        actor,
        reference,
        RolloutBatch(0, tuple(samples), {}),
        algorithm=algorithm,
        train=TrainSection(micro_batch_tokens=16),
        timer=PhaseTimer(),
        skipped=SkippedSteps(3),
        longest_reply=longest,
    )
    assert found["train/policy_loss"] == pytest.approx(wanted, rel=1e-4)
    assert found["train/kl"] == pytest.approx(sum(kl_N) / sum(lengths), rel=1e-4)


def main() -> None:
    work = Path(sys.argv[1])
    layout = ParallelSection(tensor=2, pipeline=2, sequence_parallel=True, device="cpu", collective_timeout_s=60)
    grid = init_grid(layout, seed=1)
    check_skip(work / "llama", grid)
    check_ruined(work / "llama", grid)
    check_no_samples(work / "llama", grid)
    check_bf16(work / "qwen3", grid)
    check_references(work / "qwen3", grid)
    check_kl_in_reward(work / "qwen3", grid)
    close_grid()


if __name__ == "__main__":
    main()
