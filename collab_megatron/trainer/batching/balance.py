"""Which data rank trains which sample. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def balanced_shares(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Indices per rank, so that the summed costs are close: largest first, each to the rank with least so far.

    Deterministic; every index appears once; a rank's share may be empty when there are fewer samples than ranks.
    """
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0.0] * num_ranks
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(num_ranks), key=lambda r: (loads[r], r))
        shares[rank].append(i)
        loads[rank] += costs[i]
    return [sorted(share) for share in shares]
