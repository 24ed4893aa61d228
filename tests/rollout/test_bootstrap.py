"""Bootstrap intervals: known cases, coverage, clusters."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from collab_megatron.rollout.bootstrap import Interval, bootstrap_mean


def interval(
    values: Sequence[float],
    requests: Sequence[object] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 1,
) -> Interval:
    """None: every value has a request of its own."""
    names = [str(request) for request in (range(len(values)) if requests is None else requests)]
    found = bootstrap_mean(values, names, confidence=confidence, resamples=resamples, seed=seed)
    assert found is not None
    return found


def bounds(found: Interval) -> tuple[float, float]:
    assert found.low is not None
    assert found.high is not None
    return found.low, found.high


def test_a_share_has_the_interval_of_the_binomial() -> None:
    found = interval([1.0] * 30 + [0.0] * 70)
    low, high = bounds(found)
    assert found.mean == pytest.approx(0.3)
    assert low == pytest.approx(0.3 - 1.96 * (0.21 / 100) ** 0.5, abs=0.015)
    assert high == pytest.approx(0.3 + 1.96 * (0.21 / 100) ** 0.5, abs=0.015)


def test_the_interval_contains_the_true_mean_about_as_often_as_it_promises() -> None:
    rng, hits = random.Random(3), 0
    for seed in range(200):
        values = [rng.gauss(0.0, 1.0) for _ in range(50)]
        low, high = bounds(interval(values, confidence=0.9, resamples=400, seed=seed))
        hits += low <= 0.0 <= high
    assert 0.84 <= hits / 200 <= 0.95


def test_values_of_one_request_are_drawn_together() -> None:
    """Ten equal values of a request carry the information of one."""
    values = [float(request % 2) for request in range(20) for _ in range(10)]
    apart = interval(values)
    together = interval(values, [number // 10 for number in range(200)])
    assert together.mean == apart.mean == 0.5
    (low, high), (narrow_low, narrow_high) = bounds(together), bounds(apart)
    assert high - low > 2.5 * (narrow_high - narrow_low)
    assert (low, high) == bounds(interval(values[::10]))


def test_requests_of_unequal_size_weigh_by_their_values() -> None:
    found = interval([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"])
    assert found.mean == 0.75
    assert bounds(found) == (0.0, 1.0)


def test_what_has_no_interval() -> None:
    assert bootstrap_mean([], [], confidence=0.95, resamples=10, seed=1) is None
    assert interval([0.5, 1.5], ["a", "a"]) == Interval(1.0, None, None, 2)


def test_the_seed_decides_the_draws() -> None:
    values = [float(number % 7) for number in range(40)]
    first, same, other = (interval(values, resamples=500, seed=seed) for seed in (1, 1, 2))
    assert first == same != other
