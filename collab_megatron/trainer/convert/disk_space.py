"""Is a disk full, and how much is free. Pure: no torch."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_TEXTS = ("No space left on device", "Disk quota exceeded")
# torch's zip writer swallows errno: what it says instead, believed only while the disk has next to nothing left
_WRITE_TEXTS = ("file write failed", "unexpected pos", "PytorchStreamWriter", "IoError", "Worker failure")
_NEXT_TO_NOTHING = 2**20  # bytes


def is_disk_full(error: BaseException, folder: Path) -> bool:
    """Whether `error`, or anything it was raised from or wraps, comes of a full disk or quota under `folder`."""
    chain = list(_chain(error, set()))
    if any(isinstance(e, OSError) and e.errno in _FULL for e in chain):
        return True
    texts = " ".join(str(e) for e in chain)
    if any(text in texts for text in _FULL_TEXTS):
        return True
    return any(text in texts for text in _WRITE_TEXTS) and free_bytes(folder) < _NEXT_TO_NOTHING


def free_bytes(folder: Path) -> int:
    """Bytes an ordinary user may still write under `folder` (or its nearest existing parent)."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _chain(error: BaseException, seen: set[int]) -> Iterator[BaseException]:
    """`error`, its causes and contexts, and what torch's CheckpointException collects from the ranks."""
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
