"""The temporary folder of a run: mode 0700, gone when the run ends, and after a kill -9 removed by the next start.

    TMPDIR/collab_run_x3k9w2ab/      sockets, ready files, and what the run's processes make (it is their TMPDIR)
    TMPDIR/collab_run_x3k9w2ab/owner host and pid of the owner, for people

Who owns a folder is told by a lock of the kernel's (flock) on its `owner` file. The owner passes the open file on to
its children (`held`), so the folder stays as long as one of them runs, and no number of a process that is long gone can
be mistaken for another. A folder whose lock is free has nobody left.

What the processes have in /dev/shm (semaphores and load counters of SGLang, which it leaves at every end) has random
names and no folder of its own: `note_shared_memory` writes down what they have mapped.
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
NEW = ".new_collab_run_"  # being made: it gets its last name once its lock is held
TOUCH_EVERY_S = 3600.0
NEW_S = 60.0  # one without a lock that is older was left by a kill in the middle of being made or removed
OWNER = "owner"
NOTED = "shared_memory"
SHARED_MEMORY = Path("/dev/shm")
MADE_BY_LIBRARIES = ("sem.mp-", "psm_", "sglang_", "sgl_", "torch_", "nccl-", "cuda.shm.")
"""Of multiprocessing, SGLang, torch, NCCL and CUDA. A data set that somebody keeps in /dev/shm is mapped too."""
# bytes: the 107 of a Unix socket's address, less /collab_run_XXXXXXXX and torch's /torch-shm-dir-XXXXXX/manager.sock
LONGEST_PATH = 107 - 20 - 34


class ScratchFolder:
    """One folder, from `create` to `remove`."""

    def __init__(self, folder: Path, owner: int) -> None:
        self.folder = folder
        self.held = owner  # the descriptor that children must inherit
        self._touched = time.monotonic()

    @classmethod
    def create(cls) -> ScratchFolder:
        """A new folder, after what dead runs of this user left has been removed. Raises RunError."""
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
                f"cannot make a temporary folder in {where} ({error.strerror or error}): free some space there, or set "
                "TMPDIR to another folder"
            ) from None
        return cls(folder, owner)

    def note_shared_memory(self, groups: Collection[int]) -> None:
        """Write down which files of /dev/shm the processes of these groups have mapped, for the clean-up."""
        found = {str(path) for path in _mapped(groups)}
        with contextlib.suppress(OSError):  # a full disk: those files stay, the run goes on
            noted = self.folder / NOTED
            old = set(noted.read_text().splitlines()) if noted.exists() else set()
            if found - old:
                noted.write_text("\n".join(sorted(found | old)) + "\n")

    def stay_young(self) -> None:
        """Call it often: what cleans temporary folders takes files of some days' age for nobody's."""
        now = time.monotonic()
        if now - self._touched < TOUCH_EVERY_S:
            return
        self._touched = now
        for folder, _, files in os.walk(self.folder):
            for path in (folder, *(os.path.join(folder, name) for name in files)):
                with contextlib.suppress(OSError):
                    os.utime(path)

    def remove(self) -> None:
        """Remove it, with what was noted in /dev/shm. Call it when no process of the run is left. What cannot go
        is left to the next start: it says nothing of the run."""
        try:
            with contextlib.suppress(OSError):
                _remove(self.folder)
        finally:
            os.close(self.held)


def remove_leftovers(where: Path) -> None:
    """Remove the folders of this user's runs of which no process is left."""
    for folder in _own(where, PREFIX):
        with contextlib.suppress(OSError), _owned(folder) as free:  # another start may be faster
            if free:
                logger.info("removing %s: the run that made it was killed", folder)
                _remove(folder)
    for folder in _own(where, NEW):
        with contextlib.suppress(OSError):
            if _is_old(folder):
                _remove(folder)


def _place() -> Path:
    """TMPDIR as Python finds it, unless its name is too long for the sockets that will lie in there."""
    where = Path(tempfile.gettempdir()).absolute()
    return where if len(os.fsencode(where)) <= LONGEST_PATH else Path("/tmp")


def _own(where: Path, prefix: str) -> Iterator[Path]:
    """This user's folders of that name; no link is followed, for anybody may put one there."""
    for entry in list(os.scandir(where)):
        if not entry.name.startswith(prefix):
            continue
        with contextlib.suppress(FileNotFoundError):  # removed while we looked
            found = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
                yield Path(entry.path)


@contextlib.contextmanager
def _owned(folder: Path) -> Iterator[bool]:
    """Whether nobody owns the folder any more; then it is ours for the length of the block."""
    try:
        owner = os.open(folder / OWNER, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        yield _is_old(folder)
        return
    try:
        host = os.read(owner, 1024).decode(errors="replace").partition(" ")[0]
        # the temporary folder of several machines: not every such file system carries locks from one to the other
        yield host == socket.gethostname() and _lock(owner)
    finally:
        os.close(owner)


def _is_old(folder: Path) -> bool:
    try:
        return time.time() - folder.stat().st_mtime > NEW_S
    except FileNotFoundError:  # removed while we looked
        return False


def _lock(file: int) -> bool:
    """Take the kernel's lock on an open file; False where another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _remove(folder: Path) -> None:
    """The owner's file goes last: a folder that is half removed is found again by the next start."""
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
    with contextlib.suppress(OSError):  # gone, or not ours
        if path.parent == SHARED_MEMORY and path.lstat().st_uid == os.getuid():
            path.unlink()


def _mapped(groups: Collection[int]) -> Iterator[Path]:
    """What libraries made in /dev/shm, as far as processes of these groups have it mapped.

    By number, not by name: a semaphore is mapped under another name than the one that stays.
    """
    numbers: set[int] = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            group = int((process / "stat").read_text(errors="replace").rpartition(")")[2].split()[2])
            lines = (process / "maps").read_text(errors="replace").splitlines() if group in groups else []
        except (OSError, IndexError):
            continue  # it ended while we looked
        numbers |= {int(line.split(maxsplit=5)[4]) for line in lines if f" {SHARED_MEMORY}/" in line}
    for entry in os.scandir(SHARED_MEMORY) if numbers else ():
        if entry.name.startswith(MADE_BY_LIBRARIES) and entry.inode() in numbers:
            yield Path(entry.path)
