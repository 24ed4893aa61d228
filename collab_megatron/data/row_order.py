"""The rows of a step: a pure function of (seed, step), so a resumed run continues where it stopped.

The rows form an endless sequence of epochs, each shuffled on its own; step s takes rows [s * batch_size, ...) of it. A
batch may span two epochs. Within an epoch each row is taken exactly once.

A refill replaces a prompt whose replies gave no signal. Refill r of a step takes the row half an epoch after the step's
own row r, wrapping around at the end of the epoch. So within an epoch a row is a refill at most once, on any shard and
in any attempt, and never close to its regular turn.
"""

from __future__ import annotations

import random
from functools import lru_cache


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, num_rows: int) -> tuple[int, ...]:
    order = list(range(num_rows))
    random.Random(f"order/{seed}/{epoch}").shuffle(order)
    return tuple(order)


def step_indices(seed: int, step: int, *, num_rows: int, batch_size: int) -> list[int]:
    """The `batch_size` row indices of `step` (from 0). Raises ValueError for an empty dataset or a negative step."""
    if num_rows < 1 or batch_size < 1 or step < 0:
        raise ValueError(f"step {step} of {num_rows} rows in batches of {batch_size} does not exist")
    first = step * batch_size
    return [
        _epoch(seed, position // num_rows, num_rows)[position % num_rows]
        for position in range(first, first + batch_size)
    ]


def refill_index(seed: int, step: int, number: int, *, num_rows: int, batch_size: int) -> int:
    """The row index of refill `number` (0..batch_size - 1) of `step`."""
    epoch, place = divmod(step * batch_size + number, num_rows)
    return _epoch(seed, epoch, num_rows)[(place + num_rows // 2) % num_rows]
