"""Threads of each process of a run on a machine without GPUs. Pure.

Synchronous training alternates: while the engines sample, the trainer sleeps, and vice versa. So each side uses all
cores. With driver.max_staleness above 0 both run at the same time and share the cores.
"""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class ThreadCounts:
    """Threads of one process."""

    trainer: int  # OpenMP threads of a trainer rank
    engine: int  # threads of one tensor-parallel rank of a server


def share_threads(cores: int, *, trainer_ranks: int, engine_ranks: int, at_once: bool) -> ThreadCounts:
    """Divide `cores` among the ranks on this node. `at_once`: trainer and engines run at the same time.

    Every rank gets at least one thread.
    """
    if at_once:
        each = max(1, cores // max(1, trainer_ranks + engine_ranks))
        return ThreadCounts(each, each)
    return ThreadCounts(max(1, cores // max(1, trainer_ranks)), max(1, cores // max(1, engine_ranks)))


def usable_cores() -> int:
    """Cores that this process may use (a job's share of the node)."""
    return len(os.sched_getaffinity(0))
