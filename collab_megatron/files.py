"""Text published on disk is written aside and renamed: a reader sees the old one or the new one, never half of it.
And a file's contents in a few characters, to tell whether they changed."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from collab_megatron.errors import RunError, UserError

CHUNK_BYTES = 16 * 2**20
MOST_THREADS = 8


def keep_from_others(umask: str) -> None:
    """Give what this process and its children make from now on no more rights than `umask` leaves (octal digits)."""
    os.umask(int(umask, 8))


def publish_text(path: Path, text: str) -> None:
    """Replace `path` by `text`, making its folder. Raises RunError when the disk refuses."""
    aside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text)
        os.replace(aside, path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from None


def publish_json(path: Path, value: object) -> None:
    """As `publish_text`, indented, keys in the order given."""
    publish_text(path, json.dumps(value, indent=1) + "\n")


def publish_secret(path: Path, text: str) -> None:
    """As `publish_text`, for this user's eyes alone: mode 600 from the first moment, whatever the umask is."""
    aside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.unlink(missing_ok=True)
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
        os.replace(aside, path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from None


def contents(file: Path) -> str:
    """A hash of a whole file, read in chunks on several threads. Raises UserError if it cannot be read."""
    try:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size

            def chunk(offset: int) -> bytes:
                return hashlib.sha256(os.pread(opened.fileno(), CHUNK_BYTES, offset)).digest()

            offsets = range(0, size, CHUNK_BYTES)
            if len(offsets) <= 1:
                return short_hash(b"".join(map(chunk, offsets)))
            with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
                return short_hash(b"".join(pool.map(chunk, offsets)))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None


def short_hash(data: bytes) -> str:
    """16 hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()
