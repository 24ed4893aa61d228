"""The lock of a run: one writer at a time for its files. A lock file names host, process and start of the owner.

    with run_lock(config.run) as lock, Supervisor(config.run.logs_dir, held=lock.held) as supervisor:

The file is created with O_EXCL, which is atomic on network file systems too. The lock of a dead owner is taken over:

- An owner on this machine is identified by pid and start time (a pid alone can be reused). If it was killed, its
  children may still save a checkpoint. They inherit the open file and with it the kernel's lock (flock); the next start
  waits for them.
- An owner on another machine touches the file every BEAT_S. A start that wants the lock watches the file: a touch
  proves that the owner is alive; after SILENT_S without one (a dead node) the lock is taken over. Only modification
  times of the file are compared, so the machines' clocks may differ.

An owner that was stopped, and finds on continuing that its lock was taken over, ends its run.
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
SILENT_S = 120.0  # above the delays of a network file system; Slurm takes longer to give up a node
LONG_AGO_S = 3600.0  # untouched for this long by our own clock: no need to watch
LEFT_S = 30.0  # time for the children of a killed launcher to end, besides saving
POLL_S = 0.2
TRIES = 1000  # other starts may take and release the lock meanwhile; far more than ever happens


@dataclass(frozen=True)
class LockOwner:
    """The process that has a lock."""

    host: str
    boot: str  # boot id of the machine
    namespace: str  # pid namespace: containers have their own
    pid: int
    started: int  # clock ticks after boot
    since: float  # epoch seconds, by its clock
    token: str  # unique per lock

    @classmethod
    def this_process(cls) -> LockOwner:
        started = _started(os.getpid())
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        place = os.readlink("/proc/self/ns/pid")
        assert started is not None, "this process runs"
        return cls(socket.gethostname(), boot, place, os.getpid(), started, time.time(), secrets.token_hex(8))

    def lives(self) -> bool:
        """Whether it is alive; call it only in the owner's pid namespace."""
        return _started(self.pid) in (self.started, HIDDEN)

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since).strftime("%Y-%m-%d %H:%M:%S")
        return f"process {self.pid} on {self.host} has it since {since}"


HIDDEN = -1
"""Start time of a process that is not visible: another user's, where /proc hides those."""


class RunLock:
    """A lock that this process has. `held`: open files for every child that writes the run's files."""

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
            with contextlib.suppress(OSError):  # the file system does not answer; SILENT_S allows for it
                if not _is_at(self._path, self._file):
                    self.lost = (
                        f"the lock {self._path} is lost: another process took {self._what} over while this one was "
                        "stopped, or the file was removed; this run was ended, because only one may write its files"
                    )
                    for pid in _open_in(self._file):  # at once: they must not write to the other run's files
                        with contextlib.suppress(OSError):  # it has just ended
                            os.kill(pid, signal.SIGKILL)
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                os.utime(self._file)


@contextlib.contextmanager
def run_lock(run: RunSection, save_grace_s: float = 0.0) -> Iterator[RunLock]:
    """The lock of `run.dir` and `run.name`. save_grace_s: time for the last save of a killed launcher's children.

    Raises UserError if another process has it.
    """
    what = f"run.name={run.name} in run.dir={run.dir}"
    with locked(run.lock_file, what, "choose another run.name or run.dir", save_grace_s) as lock:
        yield lock


@contextlib.contextmanager
def locked(path: Path, what: str, way_out: str, save_grace_s: float = 0.0) -> Iterator[RunLock]:
    """Hold the lock file `path` during the block. `what` it protects and the `way_out` are part of messages.

    Raises UserError if another process has it or the file cannot be created, RunError at the end of a block in which
    the lock was lost.
    """
    made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    file = _acquire(path, what, way_out, LEFT_S + save_grace_s)
    before = signal.getsignal(signal.SIGTERM)
    if before is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _interrupt)  # a lost lock sends it to us
    lock = RunLock(path, file, what)
    try:
        yield lock
    finally:
        lock.release()
        signal.signal(signal.SIGTERM, before)
        with contextlib.suppress(OSError):  # a run that wrote nothing leaves no folder
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
            continue  # another run has just removed the empty folder
        except FileExistsError as error:
            if not path.parent.is_dir():
                raise _unusable(path, error, way_out) from None
            watch.clear()
            continue
        except OSError as error:
            raise _unusable(path, error, way_out) from None
        # before writing the owner: a start in another container that reads it tries this lock
        while _flock(file) is False:
            time.sleep(0.01)  # another start examines it
        try:
            os.write(file, json.dumps(asdict(LockOwner.this_process())).encode())
            os.fsync(file)
        except OSError as error:
            path.unlink(missing_ok=True)
            os.close(file)
            raise _unusable(path, error, way_out) from None
        return file
    raise RunError(f"the lock {path} was taken and released by other processes {TRIES} times: start again")


def _unusable(path: Path, error: OSError, way_out: str) -> UserError:
    for folder in path.parents:
        if folder.exists() and not folder.is_dir():
            return UserError(f"{folder} is a file, but a folder is needed there: {way_out}")
    return UserError(
        f"cannot create the lock {path} ({error.strerror}): free some space, check the permissions of its folder, or "
        f"{way_out}"
    )


class _Watch:
    """Watches an existing lock and removes it when its owner is dead."""

    def __init__(self, path: Path, what: str, way_out: str, left_s: float) -> None:
        self._path, self._what, self._way_out, self._left_s = path, what, way_out, left_s
        self._told = False

    def clear(self) -> None:
        """Returns when the lock is removed, by us or others. Raises UserError if its owner is alive."""
        begin = time.monotonic()
        first: tuple[str, int] | None = None
        while True:
            try:
                file = os.open(
                    self._path, os.O_RDWR | os.O_CLOEXEC
                )  # opened again each time, so that a network file system refreshes it
            except FileNotFoundError:
                return
            except OSError as error:
                raise UserError(
                    f"{self._what} is in use by another user, or its lock {self._path} cannot be opened "
                    f"({error.strerror}): {self._way_out}"
                ) from None
            try:
                owner, touched = _read(file), os.fstat(file).st_mtime_ns
                free = _flock(file)
                seen = (owner.token if owner else "", touched)
                first = first or seen
                if self._is_over(owner, free, file, seen, first, time.monotonic() - begin):
                    if _is_at(self._path, file):
                        self._path.unlink(missing_ok=True)
                    return
            finally:
                os.close(file)
            time.sleep(POLL_S)

    def _is_over(
        self,
        owner: LockOwner | None,
        free: bool | None,
        file: int,
        seen: tuple[str, int],
        first: tuple[str, int],
        waited_s: float,
    ) -> bool:
        """Whether the lock has no owner any more; False: not known yet. Raises UserError if it has one."""
        here = LockOwner.this_process()
        if owner is not None and (owner.boot, owner.namespace) == (here.boot, here.namespace):
            if owner.lives():
                self._refuse(str(owner))
            if free is not False:
                return True
            if waited_s > self._left_s:
                left = ", ".join(map(str, _open_in(file))) or "?"
                self._refuse(f"{owner}; it was killed, but its children still run (processes {left}): end them")
            self._tell(f"process {owner.pid} was killed: waiting until its children have ended")
            return False
        if owner is not None and owner.boot == here.boot and free is not None:  # another container of this machine
            if not free:
                self._refuse(str(owner))
            return True
        if seen != first:
            self._refuse(str(owner) if owner else "another process has just taken it")
        # another start that is removing the lock holds the kernel's lock; on NFS a dead machine's can remain
        if free is False and waited_s <= 2 * SILENT_S:
            return False
        if waited_s > SILENT_S or time.time() - seen[1] / 1e9 > LONG_AGO_S:
            return True
        who = str(owner) if owner else "its owner is unknown"
        self._tell(f"{who}: waiting up to {SILENT_S:g} s for a sign of life")
        return False

    def _refuse(self, who: str) -> NoReturn:
        raise UserError(f"{self._what} is in use: {who} (lock {self._path}): wait until it ends, or {self._way_out}")

    def _tell(self, what: str) -> None:
        if not self._told:
            self._told = True
            print(f"{self._what} is locked: {what}", flush=True)


def _read(file: int) -> LockOwner | None:
    """The owner; None for a lock that is incomplete."""
    try:
        return LockOwner(**json.loads(os.pread(file, 4096, 0)))
    except (ValueError, TypeError):
        return None


def _flock(file: int) -> bool | None:
    """Take the kernel's lock; False if another process has it, None if the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _is_at(path: Path, file: int) -> bool:
    """Whether the open file is the one at `path`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno == errno.ESTALE:  # NFS: another machine removed it
            return False
        raise


def _started(pid: int) -> int | None:
    """Start time of a process, in clock ticks after boot; None if it has ended."""
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
        with contextlib.suppress(OSError):  # it has just ended, or belongs to another user
            for opened in (process / "fd").iterdir():
                if int(process.name) != os.getpid() and _identity(opened) == wanted:
                    found.append(int(process.name))
                    break
    return sorted(found)


def _identity(opened: Path) -> tuple[object, ...]:
    """Identity of an open file in /proc. If another machine removed it, NFS keeps only its name."""
    try:
        found = opened.stat()
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
        return ("stale", os.readlink(opened))
    return (found.st_dev, found.st_ino)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
