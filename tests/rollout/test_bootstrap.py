"""Bootstrap intervals: known cases, coverage, clusters."""

from __future__ import annotations

import random
from typing import Any

import pytest

from collab_megatron.rollout.bootstrap import bootstrap_mean

SETTINGS: dict[str, Any] = {"confidence": 0.95, "resamples": 2000, "seed": 1}


def test_a_share_has_the_interval_of_the_binomial() -> None:
    values = [1.0] * 30 + [0.0] * 70
    found = bootstrap_mean(values, [str(number) for number in range(100)], **SETTINGS)
    assert found is not None
    assert found.mean == pytest.approx(0.3)
    assert found.low == pytest.approx(0.3 - 1.96 * (0.21 / 100) ** 0.5, abs=0.015)
    assert found.high == pytest.approx(0.3 + 1.96 * (0.21 / 100) ** 0.5, abs=0.015)


def test_the_interval_contains_the_true_mean_about_as_often_as_it_promises() -> None:
    rng, hits = random.Random(3), 0
    for seed in range(200):
        values = [rng.gauss(0.0, 1.0) for _ in range(50)]
        found = bootstrap_mean(values, [str(i) for i in range(50)], confidence=0.9, resamples=400, seed=seed)
        assert found is not None
        hits += found.low <= 0.0 <= found.high
    assert 0.84 <= hits / 200 <= 0.95


def test_values_of_one_request_are_drawn_together() -> None:
    """Ten equal values of a request carry the information of one."""
    values = [float(request % 2) for request in range(20) for _ in range(10)]
    apart = bootstrap_mean(values, [str(number) for number in range(200)], **SETTINGS)
    together = bootstrap_mean(values, [str(number // 10) for number in range(200)], **SETTINGS)
    once = bootstrap_mean(values[::10], [str(number) for number in range(20)], **SETTINGS)
    assert apart is not None
    assert together is not None
    assert once is not None
    assert together.mean == apart.mean == 0.5
    assert together.high - together.low > 2.5 * (apart.high - apart.low)
    assert (together.low, together.high) == (once.low, once.high)


def test_requests_of_unequal_size_weigh_by_their_values() -> None:
    found = bootstrap_mean([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"], **SETTINGS)
    assert found is not None
    assert found.mean == 0.75
    assert (found.low, found.high) == (0.0, 1.0)


def test_what_has_no_interval() -> None:
    assert bootstrap_mean([], [], **SETTINGS) is None
    one = bootstrap_mean([0.5, 1.5], ["a", "a"], **SETTINGS)
    assert one is not None
    assert (one.mean, one.low, one.high, one.count) == (1.0, None, None, 2)


def test_the_seed_decides_the_draws() -> None:
    values, requests = [float(i % 7) for i in range(40)], [str(i) for i in range(40)]
    first, same, other = (
        bootstrap_mean(values, requests, confidence=0.95, resamples=500, seed=seed) for seed in (1, 1, 2)
    )
    assert first == same != other
