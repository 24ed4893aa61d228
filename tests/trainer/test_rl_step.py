"""The RL update of one data rank with a stand-in for the model: the passes that it asks for, and its metrics."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from collab_megatron.config.sections import AlgorithmSection, TrainSection
from collab_megatron.trainer import rl_step
from collab_megatron.trainer.actor.actor import Actor, LossFn, StepResult
from collab_megatron.trainer.batching import MicroBatch
from collab_megatron.trainer.report.timers import PhaseTimer
from collab_megatron.trainer.rl_step import update
from collab_megatron.trainer.skipped_steps import SkippedSteps
from collab_megatron.types import RolloutBatch, TrainingSample
from tests.trainer.one_process import SPEC, grid_of

STEP = 7


class Model:
    """Every token has the same log-probability, which each optimizer step raises by `learns`."""

    def __init__(self, logprob: float, norms: Sequence[float] = (1.0,), learns: float = 0.0) -> None:
        self.grid, self.spec = grid_of(), SPEC
        self.logprob, self.learns, self.passes = logprob, learns, list[str]()
        self._norms = list(norms)

    @property
    def lr(self) -> float:
        return 1e-3 * (1 + self.passes.count("train"))

    def logprobs(self, micro_batches: Sequence[MicroBatch]) -> tuple[list[Tensor], list[Tensor]]:
        self.passes.append("logprobs")
        found = [torch.full(batch.mask.shape, self.logprob) for batch in micro_batches]
        return found, found

    def train_step(self, micro_batches: Sequence[MicroBatch], loss_fn: LossFn, normalizer: float) -> StepResult:
        lr, norm = self.lr, self._norms.pop(0)
        self.passes.append("train")
        losses = [loss_fn(torch.full(batch.mask.shape, self.logprob), batch) for batch in micro_batches]
        metrics = {name: float(sum(loss.metrics[name] for loss in losses)) / normalizer for name in losses[0].metrics}
        largest = {name: float(max(loss.largest[name] for loss in losses)) for name in losses[0].largest}
        self.logprob += self.learns
        return StepResult(norm, lr, metrics, skipped=not math.isfinite(norm), largest=largest)


def sample(reply: int, advantage: float, *, gap: float, version: int = STEP) -> TrainingSample:
    """Sampled where the engine's log-prob was `gap` above -1."""
    return TrainingSample((1, 2, 3), (9,) * reply, (-1.0 + gap,) * reply, (version,) * reply, advantage)


def run(
    model: Model, samples: Sequence[TrainingSample], reference: Model | None = None, **algorithm: Any
) -> dict[str, float]:
    return update(
        cast(Actor, model),
        reference,
        RolloutBatch(STEP, tuple(samples), {}),
        algorithm=AlgorithmSection(**algorithm),
        train=TrainSection(micro_batch_tokens=16),
        timer=PhaseTimer(),
        skipped=SkippedSteps(3),
        longest_reply=16,
    )


def test_the_figures_are_means_over_trained_tokens() -> None:
    model, reference = Model(-1.0), Model(-1.5)
    samples = [sample(4, 1.0, gap=0.125), sample(12, -0.5, gap=0.125), sample(4, 0.0, gap=0.5, version=STEP - 1)]
    metrics = run(model, samples, reference)
    assert (model.passes, reference.passes) == (["train"], ["logprobs"])
    assert metrics["train/kl"] == pytest.approx(math.exp(-0.5) + 0.5 - 1)
    weight = math.exp(-0.125)  # of what the engine sampled with a higher probability than ours
    assert metrics["train/policy_loss"] == pytest.approx(-weight * (4 * 1.0 - 12 * 0.5) / 20)
    assert metrics["train/on_policy_share"] == pytest.approx(16 / 20)
    assert metrics["train/on_policy_gap"] == pytest.approx(0.125)  # of on-policy tokens alone
    assert metrics["train/logprob_gap_max"] == pytest.approx(0.5)
    assert (metrics["train/tokens"], metrics["train/lr"], metrics["train/steps_skipped"]) == (29, 1e-3, 0)


def test_mini_batches_are_compared_with_the_policy_at_the_start_of_the_step() -> None:
    model = Model(-1.0, norms=[2.0, 1.0], learns=0.25)
    metrics = run(model, [sample(4, 1.0, gap=0.0), sample(4, 1.0, gap=0.0)], mini_batches=2, kl_coef=0.0)
    assert model.passes == ["logprobs", "logprobs", "train", "train"]
    assert metrics["train/log_ratio_max"] == pytest.approx(0.25)  # of the second; the first is the policy itself
    ratio = min(math.exp(0.25), 1.2)
    assert metrics["train/policy_loss"] == pytest.approx(-(1 + ratio) / 2)
    assert (metrics["train/grad_norm"], metrics["train/lr"]) == (2.0, 2e-3)
    assert "train/kl" not in metrics


def test_a_kl_in_the_reward_takes_a_pass_of_the_policy_and_lowers_the_advantages() -> None:
    """KL of 0.5 a token (k1), coefficient 0.1: rewards 1 and 1 become 0.8 and 0.4, the mean of which is 0.6."""
    model, reference = Model(-1.0), Model(-1.5)
    samples = [
        replace(sample(4, 0.0, gap=0.0), reward=1.0, group="a"),
        replace(sample(12, 0.0, gap=0.0), reward=1.0, group="a"),
    ]
    metrics = run(model, samples, reference, preset="dr_grpo", kl_in="reward", kl_estimator="k1", kl_coef=0.1)
    assert (model.passes, reference.passes) == (["logprobs", "train"], ["logprobs"])
    # sum over tokens / (2 replies x 16 tokens); the KL is in the figures, but not in the loss
    assert metrics["train/policy_loss"] == pytest.approx(-(4 * 0.2 - 12 * 0.2) / 32)
    assert metrics["train/kl"] == pytest.approx(0.5)


@pytest.mark.parametrize("preset", ["dr_grpo", "rloo", "reinforce_pp"])
def test_a_kl_in_the_reward_compares_replies_of_all_data_ranks(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two data ranks, a thread each, together have the losses of one; a reply's KL decides its advantage."""
    samples = [
        replace(sample(length, 0.0, gap=0.0), reward=reward, group=group)
        for length, reward, group in ((4, 1.0, "a"), (12, 1.5, "a"), (6, 0.0, "b"), (2, 0.5, "b"))
    ]
    keys: dict[str, Any] = {"preset": preset, "kl_in": "reward", "kl_estimator": "k1", "kl_coef": 0.1}
    keys["mini_batches"] = 2
    alone = run(Model(-1.0, norms=[1.0, 1.0]), samples, Model(-1.5), **keys)
    barrier, given = threading.Barrier(2), [None, None]

    def gather(grid: Any, value: Any) -> list[Any]:
        given[grid.dp_rank] = value
        barrier.wait(10)
        return list(given)

    monkeypatch.setattr(rl_step, "gather", gather)

    def of_rank(rank: int) -> dict[str, float]:
        model = Model(-1.0, norms=[1.0, 1.0])
        model.grid = grid_of(rank, 2)
        return run(model, samples, Model(-1.5), **keys)

    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(of_rank, range(2)))
    assert all(0 < part["train/kl"] < alone["train/kl"] for part in parts)  # each has a share of the tokens
    assert sum(part["train/policy_loss"] for part in parts) == pytest.approx(alone["train/policy_loss"], abs=1e-6)
    assert abs(parts[0]["train/policy_loss"]) > 0.01


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize("preset", ["grpo", "dr_grpo", "rloo", "reinforce_pp_baseline", "dapo", "gspo", "cispo"])
def test_turns_of_one_conversation_have_the_loss_that_they_have_alone(preset: str, aggregation: str) -> None:
    """Two turns of one conversation and a reply, merged or, with a ratio of each turn, apart; the second optimizer step
    has other log-probs than the first."""
    samples = [
        replace(sample(4, 1.0, gap=0.125), group="a"),
        replace(sample(6, -0.5, gap=-0.25), prompt_ids=(1, 2, 3, 9, 9, 9, 9, 5), group="a"),
        replace(sample(2, -2.0, gap=0.5), prompt_ids=(1, 2), group="a"),
    ]
    keys: dict[str, Any] = {"preset": preset, "aggregation": aggregation, "mini_batches": 2}

    def figures(credit: str) -> dict[str, float]:
        model = Model(-1.0, norms=[1.0, 1.0], learns=0.125)
        return run(model, [*samples, *samples], Model(-1.5), **keys, credit=credit)

    tree, apart = figures("tree"), figures("reply")
    tokens = [found.pop("train/tokens") for found in (tree, apart)]
    assert tokens == ([36, 50] if preset != "gspo" else [50, 50])  # 14 and 4 tokens, twice; alone 7, 14 and 4
    compared = [name for name in tree if name not in ("train/model_tflop", "train/dp_imbalance")]
    assert {name: tree[name] for name in compared} == pytest.approx({name: apart[name] for name in compared}, abs=1e-6)
    assert tree["train/trained_tokens"] == 24


def test_sequence_means_and_the_effective_share_of_importance_weights() -> None:
    """Weights exp(-0.5) and 1 of replies that count alike: (4 x 0.607 + 12 x 1)^2 / (16 x (4 x 0.368 + 12))."""
    metrics = run(
        Model(-1.0),
        [sample(4, 1.0, gap=0.5), sample(12, -0.5, gap=0.0)],
        kl_coef=0.0,
        aggregation="sequence_mean",
        importance_cap=1.0,
    )
    low = math.exp(-0.5)
    assert metrics["train/policy_loss"] == pytest.approx((-low * 1.0 + 0.5) / 2)
    assert metrics["train/importance_effective_share"] == pytest.approx((4 * low + 12) ** 2 / (16 * (4 * low**2 + 12)))
    assert "train/importance_weight_squared" not in metrics


@pytest.mark.parametrize("preset", ["gspo", "reinforce_pp", "dapo", "cispo"])
def test_every_preset_trains_in_several_micro_batches(preset: str) -> None:
    """gspo at the start of its step: all ratios are 1, and the loss is minus the mean advantage."""
    samples = [replace(sample(n, a, gap=0.0), reward=a, group="a") for n, a in ((9, 1.0), (12, -0.5), (4, 0.25))]
    metrics = run(Model(-1.0), samples, Model(-1.0), preset=preset)
    assert metrics["train/clip_fraction"] == 0
    if preset == "gspo":
        assert metrics["train/policy_loss"] == pytest.approx(-0.75 / 3)


def test_a_skipped_step_is_counted_and_shown() -> None:
    metrics = run(Model(-1.0, norms=[math.nan]), [sample(4, 1.0, gap=0.0)], kl_coef=0.0)
    assert (metrics["train/steps_skipped"], metrics["train/skipped_in_a_row"]) == (1, 1)
    assert math.isnan(metrics["train/grad_norm"])


def test_a_batch_without_samples_takes_no_step_and_is_counted() -> None:
    model = Model(-1.0)
    metrics = run(model, [], Model(-1.0))
    assert (model.passes, metrics["train/steps_without_samples"], metrics["train/tokens"]) == ([], 1, 0)


def test_without_an_on_policy_token_there_is_no_gap_to_check() -> None:
    metrics = run(Model(-1.0), [sample(4, 1.0, gap=0.5, version=STEP - 1)], kl_coef=0.0)
    assert metrics["train/on_policy_share"] == 0
    assert "train/on_policy_gap" not in metrics
