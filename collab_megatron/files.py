"""Files: atomic writes (a reader sees the old file or the new one, never half of it), fsync, rights, content hashes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from collab_megatron.errors import RunError, UserError

CHUNK_BYTES = 16 * 2**20
MOST_THREADS = 8


def keep_from_others(umask: str) -> None:
    """Set the umask (octal digits) of this process and its future children."""
    os.umask(int(umask, 8))


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path next to `path` for the block to write, a file or a folder; at the end it replaces `path`.

    If the block fails, `path` stays as it was and nothing is left next to it. For one writer at a time. Makes the
    parent folder. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two processes must not write into one file
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def publish_text(path: Path, text: str, *, rights: int = 0o666) -> None:
    """Replace `path` by `text`; the umask takes from `rights`. Raises RunError when the disk refuses."""
    try:
        with atomic_write(path) as temporary:
            temporary.unlink(missing_ok=True)  # a killed process left it, perhaps with other rights
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, rights), "w") as file:
                file.write(text)
    except OSError as error:
        raise RunError(f"cannot write {path} ({error.strerror}): free some space, or check its permissions") from None


def publish_json(path: Path, value: object) -> None:
    """As `publish_text`, for indented JSON with keys in the given order."""
    publish_text(path, json.dumps(value, indent=1) + "\n")


def publish_secret(path: Path, text: str) -> None:
    """As `publish_text`, readable by this user alone: mode 600 from the first moment, whatever the umask is."""
    publish_text(path, text, rights=0o600)


def fsync(path: Path) -> None:
    """Return once the data of a file, or the entries of a folder, survive a power cut. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(folder: Path) -> None:
    """`fsync` of a folder's files, then of the folder: a rename may otherwise reach the disk before the data."""
    for path in [*(path for path in folder.iterdir() if path.is_file()), folder]:
        fsync(path)


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
        raise UserError(f"{file} cannot be read ({error.strerror or error}): check its path and permissions") from None


def short_hash(data: bytes) -> str:
    """16 hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()
