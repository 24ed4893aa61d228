"""Agreement between ranks: work of one rank for all, or of every rank, succeeds on all ranks or fails on all.

A rank that raises alone leaves the others in a collective until its deadline. Two helpers prevent that:

    rows = on_rank_zero(grid, lambda: read(file))     its result, or its error, on every rank
    with fail_together(grid, "reporting", folder):    every rank runs the block; where one fails, all raise
        if grid.is_main:
            ...

The other ranks raise an error of the same class, because callers react to classes (NoEngineLeft): a UserError or
RunError crosses as its class and message, a full disk as DiskFull, any other exception as RunError.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from collab_megatron.errors import DiskFull, RunError, UserError
from collab_megatron.trainer.actor.grid import RankGrid
from collab_megatron.trainer.convert.disk_space import is_disk_full

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankFailure:
    """An error in the form that crosses to the other ranks."""

    kind: type[Exception]  # what they raise; made of a message alone
    text: str

    @classmethod
    def of(cls, error: Exception, folder: Path | None = None) -> RankFailure:
        """`folder`: where the rank was writing, to recognize a full disk."""
        if isinstance(error, UserError | RunError):
            plain = (UserError.__init__, RunError.__init__)
            # a class with more arguments than the message crosses as its nearest base class without them
            return cls(next(kind for kind in type(error).__mro__ if kind.__init__ in plain), str(error))  # type: ignore[misc]
        if folder is not None and is_disk_full(error, folder):
            return cls(DiskFull, "disk full: free space and repeat")
        return cls(RunError, f"{type(error).__name__}: {error}")


def on_rank_zero(grid: RankGrid, act: Callable[[], T], *, group: dist.ProcessGroup | None = None) -> T:
    """Call `act` on rank 0 and return its result on every rank, or raise its error on every rank.

    The result is pickled. group: gloo over all ranks, whose deadline is longer than `act` takes; None: the grid's.
    Collective.
    """
    if grid.world_size == 1:
        return act()
    outcome: list[Any] = [None, None]
    error: Exception | None = None
    if grid.is_main:
        try:
            outcome = [act(), None]
        except Exception as raised:  # noqa: BLE001  (raised below, after the other ranks know of it)
            error, outcome = raised, [None, RankFailure.of(raised)]
    dist.broadcast_object_list(outcome, src=0, group=group or grid.cpu_group)
    result, failure = outcome
    if failure is not None:
        raise error or failure.kind(failure.text)
    return result


@contextlib.contextmanager
def fail_together(grid: RankGrid, doing: str, folder: Path) -> Iterator[None]:
    """Run the block on every rank; where any rank failed, all raise. Collective at its end.

    A rank raises its own UserError or RunError, else that of the first rank that failed. doing: the block's name in the
    message. folder: where it writes, to recognize a full disk (DiskFull).
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:  # noqa: BLE001  (raised below, after every rank knows of it)
        error = raised
    failure = None if error is None else RankFailure.of(error, folder)
    if failure is not None and failure.kind is RunError and not isinstance(error, RunError):
        logger.error("rank %d: %s failed", grid.rank, doing, exc_info=error)  # a bug, or a library's error
    with phase(grid, doing):
        failures = gather(grid, failure)
    if isinstance(error, UserError | RunError):
        raise error
    for rank, first in enumerate(failures):
        if first is not None:
            raise first.kind(f"{doing} failed: rank {rank}: {first.text}") from error


def gather(grid: RankGrid, value: T) -> list[T]:
    """Every rank's value, in rank order. Collective."""
    if grid.world_size == 1:
        return [value]
    values: list[Any] = [None] * grid.world_size
    dist.all_gather_object(values, value, group=grid.cpu_group)
    return values


def await_all_ranks(grid: RankGrid, where: str, timeout_s: float) -> None:
    """Wait until every rank is at `where`, a name that is used once. Some ranks may never come.

    Over the rendezvous store, because a gloo collective has its group's deadline on all ranks but the first. Raises
    RunError naming this rank at the deadline.
    """
    if grid.world_size == 1:
        return
    store = dist.distributed_c10d._get_default_store()
    try:
        store.set(f"{where}/{grid.rank}", "here")
        store.wait([f"{where}/{rank}" for rank in range(grid.world_size)], timedelta(seconds=timeout_s))
    except RuntimeError as error:  # DistStoreError at the deadline, DistNetworkError where rank 0 is gone
        raise RunError(f"rank {grid.rank}: not every rank reached {where} within {timeout_s:g} s") from error


@contextlib.contextmanager
def phase(grid: RankGrid, name: str) -> Iterator[None]:
    """Name the phase and this rank where a collective fails because a peer died or missed the deadline.

    Raises RunError for those; any other error passes through.
    """
    try:
        yield
    except RuntimeError as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        # gloo raises plain RuntimeErrors that only their source path gives away
        if not isinstance(error, dist.DistError) and "gloo" not in first_line:
            raise
        raise RunError(
            f"rank {grid.rank} ({grid.place}) in {name}: a peer died or did not answer within {grid.timeout_s:g} s; "
            f"its own log has the reason ({first_line})"
        ) from error
