"""Run by test_agreement.py on two ranks: an error on one rank is raised on all, by its class."""

from __future__ import annotations

import errno
import os
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch.distributed as dist

from collab_megatron.errors import BudgetSpent, DiskFull, NoEngineLeft, RunError, UserError
from collab_megatron.trainer.actor.agreement import fail_together, gather, on_rank_zero
from collab_megatron.trainer.actor.grid import RankGrid
from collab_megatron.wire.protocol import DriverHasNoEngine

FULL = OSError(errno.ENOSPC, "No space left on device")


def check_on_rank_zero(grid: RankGrid) -> None:
    assert on_rank_zero(grid, lambda: {"rank": grid.rank}) == {"rank": 0}
    main = grid.is_main
    for error, kind, text in (
        (BudgetSpent("spent"), BudgetSpent, "spent"),
        (UserError("a mistake"), UserError, "a mistake"),
        (DriverHasNoEngine("gone", {}), DriverHasNoEngine if main else NoEngineLeft, "gone"),
        (KeyError(1), KeyError if main else RunError, "1" if main else "KeyError: 1"),
    ):

        def fail(error: Exception = error) -> None:
            raise error

        with pytest.raises(kind) as raised:
            on_rank_zero(grid, fail)
        assert (type(raised.value), str(raised.value)) == (kind, text)


def check_fail_together(grid: RankGrid) -> None:
    last = grid.world_size - 1
    for error, kind, text in (
        (BudgetSpent("spent"), BudgetSpent, "spent"),
        (KeyError(1), RunError, "KeyError: 1"),
        (FULL, DiskFull, "disk full: free space and repeat"),
    ):
        with pytest.raises(kind) as raised, fail_together(grid, "the check", Path()):
            if grid.rank == last:
                raise error
        own = grid.rank == last and isinstance(error, RunError)
        assert type(raised.value) is kind
        assert str(raised.value) == (text if own else f"the check failed: rank {last}: {text}")
    with fail_together(grid, "the check", Path()):
        pass


def main() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    grid = cast(Any, SimpleNamespace(rank=rank, world_size=ranks, is_main=rank == 0, cpu_group=dist.group.WORLD))
    check_on_rank_zero(grid)
    check_fail_together(grid)
    assert gather(grid, rank) == [0, 1]
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
