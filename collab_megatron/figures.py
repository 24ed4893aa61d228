"""Figures: dashboard values as mergeable statistics, so that several processes each contribute a part."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, TypeVar

import msgspec

T = TypeVar("T")
Kind = Literal["mean", "std", "sum", "max", "min"]


class Figure(msgspec.Struct, frozen=True):
    """Statistics of some values. Merge the parts of all processes, then read `value`.

    Example: Figure.of("mean", [1, 2]) merged with Figure.of("mean", [6]) has the value 3.
    """

    kind: Kind
    n: float = 0  # number of values; of a ratio the sum of its denominators
    total: float = 0.0
    squares: float = 0.0  # sum of squared distances from the mean
    low: float = math.inf
    high: float = -math.inf

    @staticmethod
    def of(kind: Kind, values: Iterable[float]) -> Figure:
        listed = list(values)
        if not listed:
            return Figure(kind)
        total = math.fsum(listed)
        mean = total / len(listed)
        squares = math.fsum((value - mean) ** 2 for value in listed)
        return Figure(kind, len(listed), total, squares, min(listed), max(listed))

    @staticmethod
    def ratio(part: float, whole: float) -> Figure:
        """The ratio part / whole; merged as sum of parts / sum of wholes."""
        return Figure("mean", whole, part)

    def merged(self, other: Figure) -> Figure:
        n = self.n + other.n
        squares = self.squares + other.squares
        if self.n and other.n:  # Chan et al. 1979: the distance of the two means
            squares += (other.total / other.n - self.total / self.n) ** 2 * self.n * other.n / n
        low, high = min(self.low, other.low), max(self.high, other.high)
        return Figure(self.kind, n, self.total + other.total, squares, low, high)

    @property
    def value(self) -> float | None:
        """The value for the dashboard; None without a measurement, which is left out, not reported as zero."""
        if self.kind == "sum":
            return self.total
        if not self.n or (self.kind == "std" and self.n < 2):
            return None
        return {
            "mean": self.total / self.n,
            "std": math.sqrt(self.squares / max(self.n - 1, 1)),
            "max": self.high,
            "min": self.low,
        }[self.kind]


Figures = dict[str, Figure]  # by dashboard name


def of_kind(kind: Kind, values: Mapping[str, float]) -> Figures:
    """Figures of one value each."""
    return {name: Figure.of(kind, [value]) for name, value in values.items()}


def merged(parts: Iterable[Mapping[str, Figure]]) -> Figures:
    """Merge the figures of all parts by name."""
    whole: Figures = {}
    for part in parts:
        for name, figure in part.items():
            whole[name] = whole[name].merged(figure) if name in whole else figure
    return whole


def values(figures: Mapping[str, Figure]) -> dict[str, float]:
    """The values for the dashboard, without figures that have none."""
    named = {name: figure.value for name, figure in figures.items()}
    return {name: value for name, value in named.items() if value is not None}


def best_median_worst(items: Sequence[T], value: Callable[[T], float]) -> tuple[T, ...]:
    """Those three of `items`, in this order; of one or two items these. Of an even number the better middle one."""
    ranked = sorted(items, key=lambda item: -value(item))
    places = sorted({0, (len(ranked) - 1) // 2, len(ranked) - 1}) if ranked else []
    return tuple(ranked[place] for place in places)
