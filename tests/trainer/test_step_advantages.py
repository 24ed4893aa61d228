"""Advantages of a whole step: normalization over its tokens, and the KL inside the rewards."""

from __future__ import annotations

from typing import Any

import pytest

from collab_megatron.config.sections import AlgorithmSection
from collab_megatron.rollout.advantages import group_advantages
from collab_megatron.trainer.step_advantages import step_advantages
from collab_megatron.types import TrainingSample


def sample(reward: float, advantage: float, group: str, tokens: int = 2) -> TrainingSample:
    return TrainingSample((1,), (2,) * tokens, (0.0,) * tokens, (0,) * tokens, advantage, reward, group)


def test_the_drivers_advantages_are_taken_as_they_are() -> None:
    samples = [sample(9.0, 0.5, "a"), sample(9.0, -0.5, "a", tokens=1)]
    assert step_advantages(samples, AlgorithmSection()) == [[0.5, 0.5], [-0.5]]


def test_reinforce_pp_compares_with_every_group_of_the_step() -> None:
    """Two groups without spread of their own still differ from each other."""
    algorithm = AlgorithmSection(preset="reinforce_pp", kl_coef=0.0)
    samples = [sample(1.0, 1.0, "a"), sample(1.0, 1.0, "a"), sample(0.0, 0.0, "b"), sample(0.0, 0.0, "b")]
    found = step_advantages(samples, algorithm)
    assert found[0] == found[1]
    assert found[0][0] == pytest.approx((7 / 8) ** 0.5)  # unbiased variance of four ones and four zeros is 2 / 7
    assert found[2][0] == pytest.approx(-found[0][0])


def test_a_kl_in_the_reward_changes_which_reply_is_better() -> None:
    """Rewards 1 and 1.2; the second has drifted by 0.1 per token and b is 2: 1 against 0.8."""
    algorithm = AlgorithmSection(preset="dr_grpo", kl_in="reward", kl_coef=2.0)
    samples = [sample(1.0, -0.1, "a"), sample(1.2, 0.1, "a"), sample(5.0, 0.0, "b"), sample(5.0, 0.0, "b")]
    found = step_advantages(samples, algorithm, [[0.0, 0.0], [0.1, 0.1], [0.0, 0.0], [0.0, 0.0]])
    assert found[0] == pytest.approx([0.1, 0.1])
    assert found[1] == pytest.approx([-0.1, -0.1])
    assert found[2:] == [[0.0, 0.0], [0.0, 0.0]]


def test_a_group_of_one_sample_teaches_nothing() -> None:
    """The other replies have no tokens, so they are no samples."""
    algorithm = AlgorithmSection(kl_in="reward", kl_coef=2.0)
    assert step_advantages([sample(1.0, 0.4, "a")], algorithm, [[0.1, 0.2]]) == [[0.0, 0.0]]


@pytest.mark.parametrize("preset", ["grpo", "rloo", "reinforce_pp_baseline"])
def test_a_kl_of_zero_gives_the_drivers_advantages(preset: Any) -> None:
    algorithm = AlgorithmSection(preset=preset, kl_in="reward", kl_coef=1.0)
    rewards = [1.0, 0.25, 0.0]
    advantages = group_advantages(
        rewards,
        eps=algorithm.advantage_eps,
        min_std=algorithm.min_group_std,
        baseline=algorithm.baseline,
        scale=algorithm.scale,
    )
    samples = [sample(r, a, "a", tokens=t) for r, a, t in zip(rewards, advantages, (1, 2, 3), strict=True)]
    with_kl = step_advantages(samples, algorithm, [[0.0] * len(s.reply_ids_T) for s in samples])
    for found, wanted in zip(with_kl, step_advantages(samples, algorithm), strict=True):
        assert found == pytest.approx(wanted)
