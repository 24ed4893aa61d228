"""Which tokens of a row belong to which context-parallel rank. Pure.

A row is cut into 2 * ranks equal parts; rank r takes part r and part r from the end. Under causal attention an early
part is cheap and a late one dear, so every rank has the same work. This is the order that transformer-engine expects.
"""

from __future__ import annotations

import torch
from torch import Tensor


def context_columns(length: int, rank: int, ranks: int) -> Tensor:
    """int64 [length / ranks]: the columns of `rank`, ascending. Raises ValueError unless 2 * ranks divides `length`."""
    if length % (2 * ranks):
        raise ValueError(f"a row of {length} tokens cannot be cut into {2 * ranks} equal parts")
    parts = torch.arange(length).chunk(2 * ranks)
    return torch.cat([parts[rank], parts[2 * ranks - 1 - rank]])


def from_context_parts(parts: list[Tensor]) -> Tensor:
    """Every rank's [..., length / ranks], in rank order -> [..., length] in the order of the row."""
    ranks = len(parts)
    length = parts[0].shape[-1] * ranks
    columns = torch.cat([context_columns(length, rank, ranks) for rank in range(ranks)]).to(parts[0].device)
    return torch.empty_like(whole := torch.cat(parts, dim=-1)).index_copy_(-1, columns, whole)
