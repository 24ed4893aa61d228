"""One writer at a time for a run's files: a lock file with host, process and since when, which outlives no dead run.

    with run_lock(config.run) as lock, Supervisor(config.run.logs_dir, held=lock.held) as supervisor:

Made with O_EXCL, which network file systems do atomically too. Whether the holder of a lock that is there still lives:

- On the same machine its number and start time tell (a number alone may have been given to another process since). If
  it was killed, what it started may still be saving a checkpoint: those processes inherit the open file and with it the
  kernel's lock (flock), and are waited for.
- A holder on another machine touches the file every BEAT_S. Who wants the lock watches: a touch proves it alive; after
  SILENT_S without one (a node that died) the lock is taken over. Times of the file are compared with each other only,
  so the clocks of machines may differ.

A holder that was only stopped and finds, when it goes on, that its lock was taken over ends the run.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import NoReturn

from collab_megatron.config.sections import RunSection
from collab_megatron.errors import RunError, UserError

BEAT_S = 10.0
SILENT_S = 120.0  # well above a network file system's own hiccups; Slurm takes longer to give up a node
LONG_AGO_S = 3600.0  # untouched for so long by our own clock: nothing to watch for
LEFT_S = 30.0  # what a killed launcher left may take to end, next to saving
POLL_S = 0.2
TRIES = 1000  # others take and release the lock while we look: it never comes to so many


@dataclass(frozen=True)
class LockOwner:
    """Who has a lock."""

    host: str
    boot: str  # of the machine, until it starts again
    namespace: str  # in which the number means something: containers have their own
    pid: int
    started: int  # clock ticks after boot
    since: float  # seconds since 1970, by its clock
    token: str  # no two locks have the same

    @classmethod
    def this_process(cls) -> LockOwner:
        started = _started(os.getpid())
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        place = os.readlink("/proc/self/ns/pid")
        assert started is not None, "we run"
        return cls(socket.gethostname(), boot, place, os.getpid(), started, time.time(), secrets.token_hex(8))

    def lives(self) -> bool:
        """Only where its number means the same as here."""
        return _started(self.pid) in (self.started, HIDDEN)

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since).strftime("%Y-%m-%d %H:%M:%S")
        return f"process {self.pid} on {self.host} has it since {since}"


HIDDEN = -1
"""The start of a process that may not be looked at: another user's, where /proc hides those."""


class RunLock:
    """A lock that we hold. `held`: what every process that writes the run's files inherits."""

    def __init__(self, path: Path, file: int, what: str) -> None:
        self.held = (file,)
        self.lost: str | None = None
        self._path, self._file, self._what = path, file, what
        self._over = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._beats.start()

    def release(self) -> None:
        self._over.set()
        self._beats.join()
        if _is_at(self._path, self._file):
            self._path.unlink(missing_ok=True)
        os.close(self._file)

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            with contextlib.suppress(OSError):  # a file system that does not answer just now; SILENT_S allows for it
                if not _is_at(self._path, self._file):
                    self.lost = (
                        f"the lock {self._path} is no longer ours: another process took {self._what} over while this "
                        "one stood still, or somebody removed the file; this run was ended so that not two write"
                    )
                    for pid in _open_in(self._file):  # at once: what they would save is the other's now
                        with contextlib.suppress(OSError):  # it has just ended
                            os.kill(pid, signal.SIGKILL)
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                os.utime(self._file)


@contextlib.contextmanager
def run_lock(run: RunSection, save_grace_s: float = 0.0) -> Iterator[RunLock]:
    """The lock of `run.dir` and `run.name`. save_grace_s: what a killed launcher left may take for its last save.

    Raises UserError where another process has it.
    """
    what = f"run.name={run.name} in run.dir={run.dir}"
    with locked(run.lock_file, what, "choose another run.name or run.dir", save_grace_s) as lock:
        yield lock


@contextlib.contextmanager
def locked(path: Path, what: str, way_out: str, save_grace_s: float = 0.0) -> Iterator[RunLock]:
    """`path` made and held for the length of the block; `what` it protects and the `way_out` stand in the message.

    Raises UserError where another process has it or the file cannot be made, RunError at the end of a block in which it
    was lost.
    """
    made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    file = _acquire(path, what, way_out, LEFT_S + save_grace_s)
    before = signal.getsignal(signal.SIGTERM)
    if before is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _interrupt)  # a lost lock ends us by it
    lock = RunLock(path, file, what)
    try:
        yield lock
    finally:
        lock.release()
        signal.signal(signal.SIGTERM, before)
        with contextlib.suppress(OSError):  # a run that wrote nothing leaves nothing
            for folder in made:
                folder.rmdir()
        if lock.lost:
            raise RunError(lock.lost)


def _acquire(path: Path, what: str, way_out: str, left_s: float) -> int:
    """The open lock file. Raises UserError."""
    watch = _Watch(path, what, way_out, left_s)
    for _ in range(TRIES):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue  # another run's end removed the empty folder
        except FileExistsError as error:
            if not path.parent.is_dir():
                raise _unusable(path, error, way_out) from None
            watch.clear()
            continue
        except OSError as error:
            raise _unusable(path, error, way_out) from None
        # before the name stands there: a start in another container that reads it asks for this lock
        while _flock(file) is False:
            time.sleep(0.01)  # somebody looks at it
        try:
            os.write(file, json.dumps(asdict(LockOwner.this_process())).encode())
            os.fsync(file)
        except OSError as error:
            path.unlink(missing_ok=True)
            os.close(file)
            raise _unusable(path, error, way_out) from None
        return file
    raise RunError(f"the lock {path} was taken and released {TRIES} times while we waited for it")


def _unusable(path: Path, error: OSError, way_out: str) -> UserError:
    for folder in path.parents:
        if folder.exists() and not folder.is_dir():
            return UserError(f"{folder} is a file, and a folder is to be made there: {way_out}")
    return UserError(
        f"cannot make the lock {path} ({error.strerror}): free some space, see to the rights of its folder, or "
        f"{way_out}"
    )


class _Watch:
    """Looks at a lock that is there, and removes it when its holder is dead."""

    def __init__(self, path: Path, what: str, way_out: str, left_s: float) -> None:
        self._path, self._what, self._way_out, self._left_s = path, what, way_out, left_s
        self._told = False

    def clear(self) -> None:
        """Returns when the lock is gone, by us or others. Raises UserError when its holder lives."""
        begin = time.monotonic()
        first: tuple[str, int] | None = None
        while True:
            try:
                file = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)  # opened again: a network file system looks again
            except FileNotFoundError:
                return
            except OSError as error:
                raise UserError(
                    f"{self._what} is in use by another user, or its lock {self._path} cannot be opened "
                    f"({error.strerror}): {self._way_out}"
                ) from None
            try:
                holder, touched = _read(file), os.fstat(file).st_mtime_ns
                free = _flock(file)
                seen = (holder.token if holder else "", touched)
                first = first or seen
                if self._is_over(holder, free, file, seen, first, time.monotonic() - begin):
                    if _is_at(self._path, file):
                        self._path.unlink(missing_ok=True)
                    return
            finally:
                os.close(file)
            time.sleep(POLL_S)

    def _is_over(
        self,
        holder: LockOwner | None,
        free: bool | None,
        file: int,
        seen: tuple[str, int],
        first: tuple[str, int],
        waited_s: float,
    ) -> bool:
        """Whether nobody holds the lock any more; False: not known yet. Raises UserError."""
        here = LockOwner.this_process()
        if holder is not None and (holder.boot, holder.namespace) == (here.boot, here.namespace):
            if holder.lives():
                self._refuse(str(holder))
            if free is not False:
                return True
            if waited_s > self._left_s:
                left = ", ".join(map(str, _open_in(file))) or "?"
                self._refuse(f"{holder}; it was killed, and what it started still runs (processes {left}): end that")
            self._tell(f"process {holder.pid} was killed: waiting until what it started has ended")
            return False
        if holder is not None and holder.boot == here.boot and free is not None:  # another container of this machine
            if not free:
                self._refuse(str(holder))
            return True
        if seen != first:
            self._refuse(str(holder) if holder else "another process has just taken it")
        # another start that is about to remove it has the kernel's lock: not both may. A dead machine's can stay on NFS
        if free is False and waited_s <= 2 * SILENT_S:
            return False
        if waited_s > SILENT_S or time.time() - seen[1] / 1e9 > LONG_AGO_S:
            return True
        who = str(holder) if holder else "it holds no name"
        self._tell(f"{who}: watching for a sign of life, {SILENT_S:g} s at most")
        return False

    def _refuse(self, who: str) -> NoReturn:
        raise UserError(f"{self._what} is in use: {who} (lock {self._path}): wait until it ends, or {self._way_out}")

    def _tell(self, what: str) -> None:
        if not self._told:
            self._told = True
            print(f"{self._what} is locked: {what}", flush=True)


def _read(file: int) -> LockOwner | None:
    """None for a lock that is just being made, or was left half made."""
    try:
        return LockOwner(**json.loads(os.pread(file, 4096, 0)))
    except (ValueError, TypeError):
        return None


def _flock(file: int) -> bool | None:
    """Take the kernel's lock; False where another process has it, None where the file system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _is_at(path: Path, file: int) -> bool:
    """Whether the open file is the one that lies at `path`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno == errno.ESTALE:  # NFS: another machine removed it
            return False
        raise


def _started(pid: int) -> int | None:
    """When a process started, in clock ticks after boot; None where it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else int(fields[18])
    except ProcessLookupError:
        return None
    except OSError:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            return HIDDEN
        return None


def _open_in(file: int) -> list[int]:
    """Other processes of this user that have the file open."""
    wanted, found = _identity(Path(f"/proc/self/fd/{file}")), []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended while we looked, or is another user's
            for opened in (process / "fd").iterdir():
                if int(process.name) != os.getpid() and _identity(opened) == wanted:
                    found.append(int(process.name))
                    break
    return sorted(found)


def _identity(opened: Path) -> tuple[object, ...]:
    """Of an open file below /proc. NFS has nothing but its name left of one that another machine removed."""
    try:
        found = opened.stat()
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
        return ("stale", os.readlink(opened))
    return (found.st_dev, found.st_ino)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
