"""The temporary folder of a run: mode 0700, removed when the run ends; after a kill -9 the next start removes it.

    TMPDIR/collab_run_x3k9w2ab/      sockets, ready files, temporary files of the run's processes (it is their TMPDIR)
    TMPDIR/collab_run_x3k9w2ab/owner host and pid of the owner, for people

The kernel's lock (flock) on the `owner` file shows that a folder is in use. The owner passes the open file to its
children (`held`), so the lock lasts until the last of them ends, and a reused pid cannot be mistaken for the owner. A
folder whose lock is free is a leftover.

Files of the processes in /dev/shm (semaphores and load counters of SGLang, which it never removes) have random names
and no folder: `note_shared_memory` writes down the files that the processes have mapped.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from collab_megatron.errors import RunError

logger = logging.getLogger(__name__)

PREFIX = "collab_run_"
NEW = ".new_collab_run_"  # being created: renamed once its lock is held
TOUCH_EVERY_S = 3600.0
NEW_S = 60.0  # an older one without a lock was left by a kill during its creation or removal
OWNER = "owner"
NOTED = "shared_memory"
SHARED_MEMORY = Path("/dev/shm")
MADE_BY_LIBRARIES = ("sem.mp-", "psm_", "sglang_", "sgl_", "torch_", "nccl-", "cuda.shm.")
"""Prefixes of multiprocessing, SGLang, torch, NCCL and CUDA. Other mapped files, such as a dataset, stay."""
# bytes: the 107 of a Unix socket's address, less /collab_run_XXXXXXXX and torch's /torch-shm-dir-XXXXXX/manager.sock
LONGEST_PATH = 107 - 20 - 34


class ScratchFolder:
    """One temporary folder, from `create` to `remove`."""

    def __init__(self, folder: Path, owner: int) -> None:
        self.folder = folder
        self.held = owner  # file descriptor that children must inherit
        self._touched = time.monotonic()

    @classmethod
    def create(cls) -> ScratchFolder:
        """A new folder; leftovers of this user's dead runs are removed first. Raises RunError."""
        where = _place()
        try:
            remove_leftovers(where)
            aside = Path(tempfile.mkdtemp(prefix=NEW, dir=where))
            owner = os.open(aside / OWNER, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            os.write(owner, f"{socket.gethostname()} {os.getpid()}\n".encode())
            _lock(owner)
            folder = where / aside.name.replace(NEW, PREFIX, 1)
            aside.rename(folder)
        except OSError as error:
            raise RunError(
                f"cannot create a temporary folder in {where} ({error.strerror or error}): free some space, or set "
                "TMPDIR to another folder"
            ) from None
        return cls(folder, owner)

    def note_shared_memory(self, groups: Collection[int]) -> None:
        """Write down the files of /dev/shm that these process groups have mapped, for the clean-up."""
        found = {str(path) for path in _mapped(groups)}
        with contextlib.suppress(OSError):  # a full disk: those files stay, the run continues
            noted = self.folder / NOTED
            old = set(noted.read_text().splitlines()) if noted.exists() else set()
            if found - old:
                noted.write_text("\n".join(sorted(found | old)) + "\n")

    def touch(self) -> None:
        """Call it often: clean-up services remove temporary files that are some days old."""
        now = time.monotonic()
        if now - self._touched < TOUCH_EVERY_S:
            return
        self._touched = now
        for folder, _, files in os.walk(self.folder):
            for path in (folder, *(os.path.join(folder, name) for name in files)):
                with contextlib.suppress(OSError):
                    os.utime(path)

    def remove(self) -> None:
        """Remove the folder and the noted files in /dev/shm. Call it when no process of the run is left. The next start
        removes the rest, so failures do not matter."""
        try:
            with contextlib.suppress(OSError):
                _remove(self.folder)
        finally:
            os.close(self.held)


def remove_leftovers(where: Path) -> None:
    """Remove the folders of this user's runs that have no process left."""
    for folder in _own(where, PREFIX):
        with contextlib.suppress(OSError), _owned(folder) as free:  # another start may remove it first
            if free:
                logger.info("removing %s: the run that made it was killed", folder)
                _remove(folder)
    for folder in _own(where, NEW):
        with contextlib.suppress(OSError):
            if _is_old(folder):
                _remove(folder)


def _place() -> Path:
    """Python's TMPDIR, unless its path is too long for the sockets in it."""
    where = Path(tempfile.gettempdir()).absolute()
    return where if len(os.fsencode(where)) <= LONGEST_PATH else Path("/tmp")


def _own(where: Path, prefix: str) -> Iterator[Path]:
    """This user's folders with that prefix. Links are not followed, because any user can create one there."""
    for entry in list(os.scandir(where)):
        if not entry.name.startswith(prefix):
            continue
        with contextlib.suppress(FileNotFoundError):  # just removed
            found = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
                yield Path(entry.path)


@contextlib.contextmanager
def _owned(folder: Path) -> Iterator[bool]:
    """Whether the folder has no owner; then we own it during the block."""
    try:
        owner = os.open(folder / OWNER, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        yield _is_old(folder)
        return
    try:
        host = os.read(owner, 1024).decode(errors="replace").partition(" ")[0]
        # TMPDIR shared by several machines: not every file system shares locks between them
        yield host == socket.gethostname() and _lock(owner)
    finally:
        os.close(owner)


def _is_old(folder: Path) -> bool:
    try:
        return time.time() - folder.stat().st_mtime > NEW_S
    except FileNotFoundError:  # just removed
        return False


def _lock(file: int) -> bool:
    """Take the kernel's lock on an open file; False if another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _remove(folder: Path) -> None:
    """Remove the owner's file last, so that the next start recognizes a folder that is half removed."""
    noted = folder / NOTED
    with contextlib.suppress(OSError):
        for line in noted.read_text().splitlines() if noted.exists() else ():
            _unlink_shared(Path(line))
    for entry in list(os.scandir(folder)):
        if entry.name == OWNER:
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(entry.path)
    shutil.rmtree(folder, ignore_errors=True)


def _unlink_shared(path: Path) -> None:
    with contextlib.suppress(OSError):  # removed, or not ours
        if path.parent == SHARED_MEMORY and path.lstat().st_uid == os.getuid():
            path.unlink()


def _mapped(groups: Collection[int]) -> Iterator[Path]:
    """Files of libraries in /dev/shm that processes of these groups have mapped.

    Compared by inode, not by name: a semaphore is mapped under a temporary name.
    """
    inodes: set[int] = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            group = int((process / "stat").read_text(errors="replace").rpartition(")")[2].split()[2])
            lines = (process / "maps").read_text(errors="replace").splitlines() if group in groups else []
        except (OSError, IndexError):
            continue  # it has just ended
        inodes |= {int(line.split(maxsplit=5)[4]) for line in lines if f" {SHARED_MEMORY}/" in line}
    for entry in os.scandir(SHARED_MEMORY) if inodes else ():
        if entry.name.startswith(MADE_BY_LIBRARIES) and entry.inode() in inodes:
            yield Path(entry.path)
