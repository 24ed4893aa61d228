"""JSON lines: reading and appending of every growing record on disk, one object per line.

A file has one writer, which appends whole lines in one write, so a kill or a full disk can leave a torn line only at
the end. Readers skip and count a torn end; the next append removes it. A damaged line elsewhere has another cause, and
is an error that names file and line.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collab_megatron.errors import UserError
from collab_megatron.files import atomic_write, fsync

BLOCK_BYTES = 2**16
SHOWN_BYTES = 40  # of a bad line

Row = dict[str, Any]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """The contents of a file."""

    rows: list[Row]
    torn_bytes: int = 0  # of a torn line at the end; 0: none


def read_rows(path: Path, *, numbers: Sequence[str] = ()) -> Rows:
    """The objects of a file, in order; empty if the file does not exist. Raises UserError for a line that is not an
    object. numbers: keys that must have a number in every object.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return Rows([])
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
    *whole, end = content.split(b"\n")
    if end and object_of(end) is None:
        torn_bytes = len(end)
    else:
        torn_bytes, whole = 0, [*whole, end]
    rows = [row_of(line, path, number, numbers=numbers) for number, line in enumerate(whole, start=1) if line.strip()]
    return Rows(rows, torn_bytes)


def row_of(line: bytes, path: Path, number: int, *, numbers: Sequence[str] = ()) -> Row:
    """The object in line `number` (from 1) of `path`. Raises UserError if the line is not an object."""
    row = object_of(line)
    missing = None if row is None else next((key for key in numbers if not _is_number(row.get(key))), None)
    if row is None or missing is not None:
        shown = line[:SHOWN_BYTES].decode(errors="replace") + ("..." if len(line) > SHOWN_BYTES else "")
        what = "is not a JSON object" if missing is None else f"has no number {missing!r}"
        raise UserError(f"{path}: line {number} {what} ({shown!r}): remove that line, or move the file away")
    return row


def object_of(line: bytes) -> Row | None:
    """The JSON object in `line`; None for anything else."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append objects, as `append_lines` does."""
    append_lines(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def append_lines(path: Path, lines: bytes) -> None:
    """Append whole lines to `path`, all or none; a torn end is removed first.

    Only one process may append to a file. Raises OSError.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        end = _without_torn_end(descriptor, path)
        try:
            left = memoryview(lines)
            while left:
                left = left[os.write(descriptor, left) :]
        except OSError:
            os.ftruncate(descriptor, end)
            raise
    finally:
        os.close(descriptor)


def keep_rows(path: Path, keep: Callable[[Row], bool], *, numbers: Sequence[str] = ()) -> None:
    """Remove a torn end and all objects that `keep` rejects. Raises as `read_rows`, and OSError."""
    found = read_rows(path, numbers=numbers)
    kept = [row for row in found.rows if keep(row)]
    if found.torn_bytes or len(kept) < len(found.rows):
        if found.torn_bytes:
            _tell(path, found.torn_bytes)
        replace_rows(path, kept)


def replace_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace the contents of `path` by objects, as `replace_lines` does."""
    replace_lines(path, (json.dumps(row).encode() + b"\n" for row in rows))


def replace_lines(path: Path, lines: Iterable[bytes]) -> None:
    """Replace the contents of `path` by `lines`, atomically and on the disk. Raises OSError."""
    with atomic_write(path) as temporary:
        with temporary.open("wb") as file:
            file.writelines(lines)
        fsync(temporary)


def _without_torn_end(descriptor: int, path: Path) -> int:
    """Remove a torn end; an object without its line end gets one. Returns the new size of the file."""
    size = os.fstat(descriptor).st_size
    tail = b""
    begin = size
    while begin and b"\n" not in tail:
        step = min(BLOCK_BYTES, begin)
        begin -= step
        tail = os.pread(descriptor, step, begin) + tail
    torn = tail[tail.rfind(b"\n") + 1 :]
    if not torn:
        return size
    if object_of(torn) is not None:
        return size + os.write(descriptor, b"\n")
    _tell(path, len(torn))
    os.ftruncate(descriptor, size - len(torn))
    return size - len(torn)


def _tell(path: Path, torn_bytes: int) -> None:
    logger.warning("%s: removed %d bytes of a torn line at its end", path, torn_bytes)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
