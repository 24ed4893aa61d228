"""Division of a batch between ranks: samples between data ranks, tokens of a row between context ranks. Pure.

A row is cut into 2 * ranks equal parts; context rank r takes part r and part r from the end. Under causal attention an
early part is cheap and a late one expensive, so every rank has the same work. transformer-engine expects this order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def balanced_partition(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Sample indices per data rank, with close sums of costs: largest first, each to the rank with the least so far.

    Deterministic; every index appears once. With fewer samples than ranks some ranks have none.
    """
    parts: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0.0] * num_ranks
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(num_ranks), key=lambda r: (loads[r], r))
        parts[rank].append(i)
        loads[rank] += costs[i]
    return [sorted(part) for part in parts]


def context_columns(length: int, rank: int, ranks: int) -> Tensor:
    """int64 [length / ranks]: the columns of context rank `rank`, ascending. Raises ValueError unless 2 * ranks divides
    `length`."""
    if length % (2 * ranks):
        raise ValueError(f"a row of {length} tokens cannot be cut into {2 * ranks} equal parts")
    parts = torch.arange(length).chunk(2 * ranks)
    return torch.cat([parts[rank], parts[2 * ranks - 1 - rank]])


def from_context_parts(parts: list[Tensor]) -> Tensor:
    """Every context rank's [..., length / ranks], in rank order -> [..., length] in the order of the row."""
    ranks = len(parts)
    length = parts[0].shape[-1] * ranks
    columns = torch.cat([context_columns(length, rank, ranks) for rank in range(ranks)]).to(parts[0].device)
    return torch.empty_like(whole := torch.cat(parts, dim=-1)).index_copy_(-1, columns, whole)
