"""How many threads each process of a run gets on a machine without GPUs. Pure.

Synchronous training alternates: while the engines sample, the trainer waits asleep, and the other way round. So each
side may use every core. With driver.max_staleness above 0 both work at once, and share the cores.
"""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class ThreadCounts:
    """Of one process each."""

    trainer: int  # OpenMP threads of a trainer rank
    engine: int  # of one tensor-parallel rank of a server


def share_threads(cores: int, *, trainer_ranks: int, engine_ranks: int, at_once: bool) -> ThreadCounts:
    """`cores` of this node for its ranks; 0 ranks: none runs here. `at_once`: trainer and engines work side by side.

    At least one thread each, however many ranks there are.
    """
    if at_once:
        each = max(1, cores // max(1, trainer_ranks + engine_ranks))
        return ThreadCounts(each, each)
    return ThreadCounts(max(1, cores // max(1, trainer_ranks)), max(1, cores // max(1, engine_ranks)))


def usable_cores() -> int:
    """Cores that this process may run on (a job's share of the node)."""
    return len(os.sched_getaffinity(0))
