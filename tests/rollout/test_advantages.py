"""Advantages by hand and against loops; shaping by length; the KL in the rewards."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collab_megatron.rollout.advantages import (
    group_advantages,
    kl_returns,
    normalized_over_tokens,
    overlong_shaping,
)

PLAIN: dict[str, Any] = {"eps": 1e-12, "min_std": 0.0}
rewards = st.lists(st.floats(-3, 3), min_size=2, max_size=9)


def test_grpo_by_hand() -> None:
    assert group_advantages([1.0, 0.0], **PLAIN) == pytest.approx([2**-0.5, -(2**-0.5)])
    # all wrong, lengths differ by a token: no signal rather than a full-size one
    assert group_advantages([-0.0010, -0.0011, -0.0012], eps=0.05, min_std=0.01) == [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="two rewards"):
        group_advantages([1.0], eps=0.05, min_std=0.01)


def test_dr_grpo_and_rloo_by_hand() -> None:
    """Rewards 3, 0, 0: the mean is 1, and of the others 0, 1.5, 1.5."""
    assert group_advantages([3.0, 0.0, 0.0], scale="none", **PLAIN) == pytest.approx([2, -1, -1])
    rloo = group_advantages([3.0, 0.0, 0.0], baseline="leave_one_out", scale="none", **PLAIN)
    assert rloo == pytest.approx([3, -1.5, -1.5])


@given(rewards)
def test_rloo_compares_with_the_other_replies(values: list[float]) -> None:
    found = group_advantages(values, baseline="leave_one_out", scale="none", **PLAIN)
    for i, value in enumerate(values):
        others = [other for j, other in enumerate(values) if j != i]
        assert found[i] == pytest.approx(value - statistics.fmean(others), abs=1e-9)


def test_a_baseline_of_the_batch_leaves_the_rewards_to_the_trainer() -> None:
    assert group_advantages([0.5, 0.5], baseline="batch", scale="batch_std", eps=0.05, min_std=0.01) == [0.5, 0.5]


def test_normalized_over_tokens_by_hand() -> None:
    """A reply of two tokens counts twice in mean and variance: values 1, 1, 4 have mean 2 and variance 3."""
    found = normalized_over_tokens([[1.0, 1.0], [4.0]])
    assert found[0] == pytest.approx([-1 / math.sqrt(3)] * 2)
    assert found[1] == pytest.approx([2 / math.sqrt(3)])
    assert normalized_over_tokens([[5.0]]) == [[0.0]]
    assert normalized_over_tokens([[2.0, 2.0], [2.0]]) == [[0.0, 0.0], [0.0]]  # no spread, no signal


def test_kl_returns_by_hand() -> None:
    """A token answers for its own KL and that of later tokens."""
    assert kl_returns(1.0, [0.5, 0.0, 0.25], coef=2.0) == pytest.approx([-0.5, 0.5, 0.5])
    assert kl_returns(1.0, [], coef=2.0) == []


@pytest.mark.parametrize(
    ("tokens", "shaping"), [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0), (120, -1.0)]
)
def test_overlong_shaping_by_hand(tokens: int, shaping: float) -> None:
    """100 tokens of which the last 20 cost: DAPO's equation 13."""
    found = overlong_shaping(tokens, longest=100, share=0.2, penalty=1.0)
    assert found == pytest.approx(shaping)
    assert overlong_shaping(tokens, longest=100, share=0.2, penalty=0.5) == pytest.approx(shaping / 2)
    assert overlong_shaping(tokens, longest=100, share=0.0, penalty=1.0) == 0.0
