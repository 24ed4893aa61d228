"""A range of a flattened tensor as boxes, the only shape that a checkpoint file can store. Pure: no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """A box-shaped part of a row-major tensor that is contiguous in memory."""

    offset: tuple[int, ...]  # of its first element, per axis
    shape: tuple[int, ...]
    start: int  # of its first element in the flattened tensor

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def boxes_of_range(shape: tuple[int, ...], start: int, end: int) -> Iterator[Box]:
    """Elements [start, end) of a flattened tensor of `shape` as the fewest contiguous boxes, in order.

    At most 2 * axes - 1: the end of a row, whole rows, the start of a row, and so on for inner axes.
    """
    if start >= end:
        return
    if len(shape) < 2:
        yield Box((start,) * len(shape), (end - start,) * len(shape), start)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row  # whole rows
    if first > last:  # inside one row
        yield from _inside(shape, last, start, end)
        return
    yield from _inside(shape, first - 1, start, first * row)
    if first < last:
        rest = len(shape) - 1
        yield Box((first,) + (0,) * rest, (last - first, *shape[1:]), first * row)
    yield from _inside(shape, last, last * row, end)


def _inside(shape: tuple[int, ...], index: int, start: int, end: int) -> Iterator[Box]:
    """The boxes of [start, end), a range inside row `index`."""
    base = index * math.prod(shape[1:])
    for box in boxes_of_range(shape[1:], start - base, end - base):
        yield Box((index, *box.offset), (1, *box.shape), base + box.start)
