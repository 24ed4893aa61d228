"""A stretch of work that every rank does for itself and that succeeds on all ranks or fails on all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from collab_megatron.errors import RunError, UserError
from collab_megatron.trainer.actor.grid import RankGrid, agree, phase
from collab_megatron.trainer.convert.disk import is_disk_full


@contextlib.contextmanager
def together(grid: RankGrid, doing: str, folder: Path) -> Iterator[None]:
    """Run the block, then hear how it went elsewhere. Collective.

    Where any rank failed, each raises its own UserError or RunError, or else RunError with what the first rank said.
    `doing`: what to call the block. `folder`: where it writes, to tell a full disk.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001  (raised again below, once every rank has heard of it)
        failure = error
    text = None
    if failure is not None:
        ours = isinstance(failure, UserError | RunError)
        text = str(failure) if ours else f"{type(failure).__name__}: {failure}"
        if is_disk_full(failure, folder):
            text = "disk full: free space and repeat"
    with phase(grid, doing):
        said = agree(grid, text)
    if isinstance(failure, UserError | RunError):
        raise failure
    if said:
        raise RunError(f"{doing} failed: {said[0]}") from failure
