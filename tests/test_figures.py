"""Figures put together from parts are those of the whole."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collab_megatron.figures import Figure, Kind, merged, values

NUMBERS = st.lists(st.floats(-1e6, 1e6), max_size=8)


@given(st.lists(NUMBERS, min_size=1, max_size=4))
def test_parts_make_the_whole(parts: list[list[float]]) -> None:
    whole = [value for part in parts for value in part]
    right: dict[Kind, Callable[[list[float]], float]] = {
        "mean": statistics.fmean,
        "std": statistics.stdev,
        "sum": math.fsum,
        "max": max,
        "min": min,
    }
    for kind, of in right.items():
        got = values(merged({"x": Figure.of(kind, part)} for part in parts)).get("x")
        if len(whole) < {"sum": 0, "std": 2}.get(kind, 1):
            assert got is None  # nothing was measured: no figure
        else:
            assert got == pytest.approx(of(whole), rel=1e-6, abs=1e-3)


def test_ratios_are_weighed_by_what_they_are_over() -> None:
    both = merged([{"x": Figure.ratio(1, 1)}, {"x": Figure.ratio(0, 9)}])
    assert values(both) == {"x": 0.1}
    assert values({"x": Figure.ratio(0, 0)}) == {}


def test_figures_travel() -> None:
    figure = Figure.of("std", [])
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(figure), type=Figure) == figure
