"""A dashboard figure that can be put together from the parts that several driver processes hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

Kind = Literal["mean", "std", "sum", "max", "min"]


class Figure(msgspec.Struct, frozen=True):
    """What is needed of some values to give one figure of all values: merge first, then ask for `value`."""

    kind: Kind
    n: float = 0  # values seen; for a ratio the sum of what it is over
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
        """part / whole; merged as sum of parts / sum of wholes."""
        return Figure("mean", whole, part)

    def merged(self, other: Figure) -> Figure:
        n = self.n + other.n
        squares = self.squares + other.squares
        if self.n and other.n:  # Chan et al. 1979: of the two means
            squares += (other.total / other.n - self.total / self.n) ** 2 * self.n * other.n / n
        low, high = min(self.low, other.low), max(self.high, other.high)
        return Figure(self.kind, n, self.total + other.total, squares, low, high)

    @property
    def value(self) -> float | None:
        """None where nothing was measured: such a figure is left out, not written as zero."""
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
    """One value each."""
    return {name: Figure.of(kind, [value]) for name, value in values.items()}


def merged(parts: Iterable[Mapping[str, Figure]]) -> Figures:
    """The figures of all parts together."""
    whole: Figures = {}
    for part in parts:
        for name, figure in part.items():
            whole[name] = whole[name].merged(figure) if name in whole else figure
    return whole


def values(figures: Mapping[str, Figure]) -> dict[str, float]:
    """What stands on the dashboard."""
    named = {name: figure.value for name, figure in figures.items()}
    return {name: value for name, value in named.items() if value is not None}
