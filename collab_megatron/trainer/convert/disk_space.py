"""Free disk space, and whether an error means that the disk is full. Pure: no torch."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_TEXTS = ("No space left on device", "Disk quota exceeded")
# torch's zip writer hides errno: its messages count only if the disk has almost no space left
_WRITE_TEXTS = ("file write failed", "unexpected pos", "PytorchStreamWriter", "IoError", "Worker failure")
_ALMOST_FULL = 2**20  # bytes


def is_disk_full(error: BaseException, folder: Path) -> bool:
    """Whether `error`, or an error that it wraps or was raised from, means a full disk or quota under `folder`."""
    chain = list(_chain(error, set()))
    if any(isinstance(e, OSError) and e.errno in _FULL for e in chain):
        return True
    texts = " ".join(str(e) for e in chain)
    if any(text in texts for text in _FULL_TEXTS):
        return True
    return any(text in texts for text in _WRITE_TEXTS) and free_bytes(folder) < _ALMOST_FULL


def free_bytes(folder: Path) -> int:
    """Bytes that an ordinary user can still write under `folder`, or its nearest existing parent."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _chain(error: BaseException, seen: set[int]) -> Iterator[BaseException]:
    """`error`, its causes and contexts, and the ranks' errors in torch's CheckpointException."""
    if id(error) in seen:
        return
    seen.add(id(error))
    yield error
    for inner in (error.__cause__, error.__context__):
        if inner is not None:
            yield from _chain(inner, seen)
    failures = getattr(error, "failures", None)  # rank -> (exception, traceback)
    for failure in failures.values() if isinstance(failures, dict) else ():
        if isinstance(failure, tuple) and isinstance(failure[0], BaseException):
            yield from _chain(failure[0], seen)
