"""The update of online DPO with a stand-in for the model: its passes, its metrics, and batches that are no pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import pytest

from collab_megatron.config.sections import TrainSection
from collab_megatron.errors import RunError
from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.online_dpo import pairs_of, update_on_pairs
from collab_megatron.trainer.report.timers import PhaseTimer
from collab_megatron.trainer.skipped_steps import SkippedSteps
from collab_megatron.types import RolloutBatch, TrainingSample
from tests.trainer.test_rl_step import STEP, Model, sample

PROMPT = 3


def pair(chosen: int, rejected: int, *, gap: float = 0.125, version: int = STEP) -> list[TrainingSample]:
    """Replies of so many tokens."""
    return [
        replace(sample(tokens, sign, gap=gap, version=version), reward=sign)
        for tokens, sign in ((chosen, 1.0), (rejected, -1.0))
    ]


def run(
    model: Model, samples: Sequence[TrainingSample], reference: Model, *, mini_batches: int = 1
) -> tuple[dict[str, float], dict[str, float]]:
    """The metrics, and the seconds by phase."""
    timer = PhaseTimer()
    metrics = update_on_pairs(
        cast(Actor, model),
        reference,
        RolloutBatch(STEP, tuple(samples), {}),
        beta=0.5,
        mini_batch_count=mini_batches,
        train=TrainSection(micro_batch_tokens=16),
        timer=timer,
        skipped=SkippedSteps(3),
    )
    return metrics, timer.drain()


def test_figures_are_means_over_pairs_and_those_of_tokens_over_tokens() -> None:
    model, reference = Model(-1.0), Model(-1.5)
    metrics, seconds = run(model, [*pair(4, 2), *pair(1, 9, gap=0.5, version=STEP - 1)], reference)
    assert (model.passes, reference.passes, set(seconds)) == (
        ["train"],
        ["logprobs"],
        {"time_s/logprobs", "time_s/update"},
    )
    # every token is 0.5 above the reference: a reply of T tokens has the reward 0.5 * 0.5 * T
    assert metrics["train/chosen_reward"] == pytest.approx(0.25 * (4 + 1) / 2)
    assert metrics["train/rejected_reward"] == pytest.approx(0.25 * (2 + 9) / 2)
    assert metrics["train/reward_margin"] == pytest.approx(0.25 * (2 - 8) / 2)
    assert metrics["train/pair_accuracy"] == 0.5
    assert (metrics["train/chosen_logprob"], metrics["train/rejected_logprob"]) == (-2.5, -5.5)
    assert metrics["train/on_policy_share"] == pytest.approx(6 / 16)
    assert metrics["train/on_policy_gap"] == pytest.approx(0.125)
    assert metrics["train/logprob_gap"] == pytest.approx((6 * 0.125 + 10 * 0.5) / 16)
    assert (metrics["train/tokens"], metrics["train/lr"]) == (16 + 4 * PROMPT, 1e-3)


def test_mini_batches_are_whole_pairs() -> None:
    model = Model(-1.0, norms=[2.0, 1.0], learns=0.25)
    metrics, _ = run(model, [*pair(2, 3, gap=0.5), *pair(1, 4, gap=0.5)], Model(-1.0), mini_batches=2)
    assert model.passes == ["train", "train"]
    assert metrics["train/grad_norm"] == 2.0
    assert metrics["train/reward_margin"] == pytest.approx((0 + 0.5 * 0.25 * (1 - 4)) / 2)
    # what the first mini-batch changed is no gap between engine and trainer
    assert (metrics["train/on_policy_gap"], metrics["train/logprob_gap"]) == (0.5, 0.5)
    assert metrics["train/on_policy_share"] == 1.0
    few = Model(-1.0)
    run(few, pair(2, 3), Model(-1.0), mini_batches=4)
    assert few.passes == ["train"]


def test_a_batch_without_pairs_takes_no_step_and_is_counted() -> None:
    model = Model(-1.0)
    metrics, seconds = run(model, [], Model(-1.0))
    assert (model.passes, metrics["train/steps_without_samples"]) == ([], 1)
    assert set(seconds) == {"time_s/logprobs", "time_s/update"}


def test_a_skipped_step_is_counted() -> None:
    metrics, _ = run(Model(-1.0, norms=[math.nan]), pair(2, 3), Model(-1.0))
    assert (metrics["train/steps_skipped"], metrics["train/skipped_in_a_row"]) == (1, 1)


def test_samples_that_are_not_pairs_are_refused() -> None:
    chosen, rejected = pair(2, 3)
    assert pairs_of(RolloutBatch(STEP, (chosen, rejected), {})) == [(chosen, rejected)]
    for samples in (
        (chosen,),
        (rejected, chosen),
        (chosen, replace(rejected, prompt_ids=(1, 2))),
    ):
        with pytest.raises(RunError, match=f"step {STEP + 1} .* has no pairs"):
            pairs_of(RolloutBatch(STEP, samples, {}))
