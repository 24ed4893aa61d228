"""Launcher of one untrusted program; a script, started as `python -I -S launcher.py SPEC` with an empty environment.

    driver ── launcher, watches memory ── init, PID 1 of the sandbox ── program, and whatever it starts
              (outside)                   (root file system, deadline)   (no privileges, limits, system call filter)

The program sees a read-only file system with the system's libraries and its interpreter, an empty home, a temporary
directory in memory, its own process table, and no network. When PID 1 ends, the kernel ends every process of the
sandbox. PID 1 ends with the program, at the deadline, and when the launcher dies.

As root the launcher makes the namespaces directly and the program gets a user id of its own, since the kernel does not
limit the processes of root. Otherwise it uses a user namespace. Modes: `isolated`; `unsafe`, limits without namespaces;
`bubblewrap`, where the program is bubblewrap, which starts this script again in its sandbox; `inside`, that one.

Exit codes: 0 and 1 as the program ended, and the constants below.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import resource
import select
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any, NoReturn

TIMEOUT, MEMORY, SETUP = 10, 11, 12
"""Exit codes: the deadline, the memory of all processes together, or no sandbox (the reason is on standard error)."""

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
NEW_ANY = 0x7E020000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 1, 38, 22, 2
PR_SET_CHILD_SUBREAPER = 36
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
WATCH_S = 0.1
END_S = 2.0  # for processes that go on forking while they are killed
FIRST_ID = 1_000_000_000  # user ids that no system hands out
IDS = 100_000_000
INNER_ID = 1000  # the program's user id in a user namespace

ARCHITECTURES = {"x86_64": (0, 0xC000003E, 155, 56), "aarch64": (1, 0xC00000B7, 41, 220)}
"""Machine -> (column of DENIED, audit architecture, number of pivot_root, number of clone)."""
DENIED = {
    # new namespaces and mounts, where the limits would not hold
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    # memory that belongs to no process
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    # other processes, and large parts of the kernel that no test needs
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
}
CLONE3 = 435  # its flags are in memory, where a filter cannot look; the C library falls back to clone
EPERM, ENOSYS = 1, 38

libc = ctypes.CDLL(None, use_errno=True)


class SetupError(Exception):
    """The sandbox cannot be made."""


def main() -> None:
    spec = json.loads(sys.argv[1])
    os.umask(0o022)  # the program's user reads folders that this one makes
    reading, writing = os.pipe()
    try:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if spec["mode"] == "inside":
            _exec(spec, own_user=None)
        if not os.path.exists(f"/proc/{os.getpid()}/task/{os.getpid()}/children"):
            raise SetupError("the kernel lacks CONFIG_PROC_CHILDREN, so memory cannot be watched")
        if spec["mode"] == "isolated":
            own_user = _own_user()
            _enter_namespaces(own_user)
        else:
            own_user = None
            _prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans of the program become children of this process
        first = os.fork()
    except (OSError, SetupError) as error:
        _fail(str(error))
    if not first:
        os.close(reading)
        _first_process(spec, own_user, writing)
    os.close(writing)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # after the fork: PID 1 and the program keep the default
    try:
        code = _watch(first, spec["memory_mb"] << 20)
    finally:
        _end_descendants()  # none in a sandbox
    reason = os.read(reading, 65536).decode(errors="replace") if select.select([reading], [], [], 0)[0] else ""
    if reason:
        _fail(reason)
    sys.exit(code if code in (0, TIMEOUT, MEMORY) else 1)


def _fail(reason: str) -> NoReturn:
    print(reason, file=sys.stderr)
    sys.exit(SETUP)


def _own_user() -> int | None:
    """A user id for the program if this process may take any, which needs root and a range of ids."""
    if os.geteuid():
        return None
    with open("/proc/self/uid_map") as ranges:
        for line in ranges:
            start, _, length = map(int, line.split())
            if start == 0 and length > FIRST_ID + IDS:
                return FIRST_ID + os.getpid() % IDS
            if start == 0 and length > 1000:  # in a container
                return length // 2 + os.getpid() % (length // 2 - 1)
    return None


def _enter_namespaces(own_user: int | None) -> None:
    """All but the mount namespace, which PID 1 makes: this process needs the outer /proc."""
    if platform.machine() not in ARCHITECTURES:
        raise SetupError(f"the system call filter knows {', '.join(ARCHITECTURES)}, not {platform.machine()}")
    user, group = os.geteuid(), os.getegid()
    flags = NEWPID | NEWNET | NEWIPC | NEWUTS | (NEWUSER if own_user is None else 0)
    what = "namespaces" if own_user is not None else "a user namespace"
    _check(libc.unshare(flags), f"the kernel refused {what} (unshare)")
    if own_user is None:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{INNER_ID} {user} 1"),
            ("gid_map", f"{INNER_ID} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def _first_process(spec: dict[str, Any], own_user: int | None, failures: int) -> NoReturn:
    """PID 1 of the sandbox: makes the file system, starts the program, ends with it or at the deadline."""
    try:
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if spec["mode"] == "isolated":
            _make_root(spec, own_user)
        program = os.fork()
        if not program:
            try:
                _exec(spec, own_user)
            except (OSError, SetupError) as error:
                os.write(failures, str(error).encode())
            os._exit(SETUP)
    except (OSError, SetupError) as error:
        os.write(failures, str(error).encode())
        os._exit(SETUP)
    os.close(failures)
    signal.signal(signal.SIGALRM, lambda number, frame: os._exit(TIMEOUT))
    signal.setitimer(signal.ITIMER_REAL, spec["time_s"])
    while True:
        pid, status = os.wait()  # orphans too
        if pid == program:
            os._exit(min(os.waitstatus_to_exitcode(status) & 0xFF, 1))


def _make_root(spec: dict[str, Any], own_user: int | None) -> None:
    """A root file system of read-only parts of this one. Raises OSError, SetupError."""
    _check(libc.unshare(NEWNS), "the kernel refused a mount namespace (unshare)")
    _mount("none", "/", "", MS_REC | MS_PRIVATE)
    sources = {path: os.open(path, os.O_PATH) for path in spec["shows"]}  # before /tmp is hidden
    root = "/tmp"
    _mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=4m,mode=755")
    # before the parts: an interpreter may lie below /home or /tmp
    for name, size in (("/tmp", spec["disk_mb"]), ("/home", 1)):
        os.makedirs(root + name, exist_ok=True)
        _mount("tmpfs", root + name, "tmpfs", MS_NOSUID | MS_NODEV, f"size={size}m,mode=1777")
    for path, source in sources.items():
        target = root + path
        if not os.path.isdir(f"/proc/self/fd/{source}"):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with open(target, "w"):
                pass
        else:
            os.makedirs(target, exist_ok=True)
        _mount(f"/proc/self/fd/{source}", target, "", MS_BIND | MS_REC)
        if not path.startswith("/dev/"):
            _read_only(target, recursive=True)
        os.close(source)
    for link, to in spec["links"].items():
        os.symlink(to, root + link)
    os.makedirs(root + "/dev/shm", exist_ok=True)
    _mount("tmpfs", root + "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, f"size={spec['disk_mb']}m,mode=1777")
    user = INNER_ID if own_user is None else own_user
    os.makedirs(root + "/etc", exist_ok=True)
    for name, text in (
        ("passwd", f"user:x:{user}:{user}::/home:/bin/sh\n"),
        ("group", f"user:x:{user}:\n"),
        ("hosts", "127.0.0.1 localhost\n"),
    ):
        with open(f"{root}/etc/{name}", "w") as file:
            file.write(text)
    os.makedirs(root + "/proc")
    # where the outer /proc is masked, as in many containers, the kernel refuses a new one; then /proc stays empty
    libc.mount(b"proc", (root + "/proc").encode(), b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None)
    os.chdir(root)
    pivot_root = ARCHITECTURES[platform.machine()][2]
    _check(libc.syscall(pivot_root, b".", b"."), "the kernel refused another root (pivot_root)")
    _check(libc.umount2(b".", MNT_DETACH), "the old root cannot be left (umount)")
    os.chdir("/")
    _read_only("/", recursive=False)


def _exec(spec: dict[str, Any], own_user: int | None) -> NoReturn:
    """Become the program. Raises OSError, SetupError."""
    os.setsid()
    os.chdir(spec["folder"])
    if spec["mode"] != "bubblewrap":
        _limit(spec)
    if own_user is not None:
        os.setgroups([])
        os.setresgid(own_user, own_user, own_user)
        os.setresuid(own_user, own_user, own_user)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # after the change of user, which clears it
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    if spec["mode"] in ("isolated", "inside"):
        _filter_system_calls()
    os.execve(spec["command"][0], spec["command"], spec["environment"])


def _limit(spec: dict[str, Any]) -> None:
    mb = 1 << 20
    limits = {
        resource.RLIMIT_AS: spec["memory_mb"] * mb,
        resource.RLIMIT_CPU: int(spec["time_s"]) + 1,
        resource.RLIMIT_FSIZE: spec["disk_mb"] * mb,
        resource.RLIMIT_NOFILE: 256,
        resource.RLIMIT_CORE: 0,
    }
    if spec["mode"] != "unsafe":  # there all processes of this user would count
        limits[resource.RLIMIT_NPROC] = spec["processes"]
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))


def _filter_system_calls() -> None:
    """Refuse what DENIED names, new namespaces, and system calls of another architecture."""
    column, audit, _, clone = ARCHITECTURES[platform.machine()]
    load, equal, at_least, masked, ret = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF: LD|W|ABS, JEQ, JGE, JSET, RET
    kill, allow, error = 0x80000000, 0x7FFF0000, 0x00050000
    program = [(load, 0, 0, 4), (equal, 1, 0, audit), (ret, 0, 0, kill), (load, 0, 0, 0)]
    program += [(at_least, 0, 1, 0x40000000), (ret, 0, 0, error | ENOSYS)]  # x32
    for numbers in DENIED.values():
        program += [(equal, 0, 1, numbers[column]), (ret, 0, 0, error | EPERM)]
    program += [(equal, 0, 1, CLONE3), (ret, 0, 0, error | ENOSYS)]
    program += [(equal, 0, 3, clone), (load, 0, 0, 16), (masked, 0, 1, NEW_ANY), (ret, 0, 0, error | EPERM)]
    program += [(ret, 0, 0, allow)]

    class Instruction(ctypes.Structure):
        _fields_ = [("code", ctypes.c_ushort), ("yes", ctypes.c_ubyte), ("no", ctypes.c_ubyte), ("k", ctypes.c_uint)]

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.POINTER(Instruction))]

    instructions = (Instruction * len(program))(*(Instruction(*line) for line in program))
    whole = Program(len(program), instructions)
    _prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(whole))


def _watch(first: int, most_bytes: int) -> int:
    """The exit code of PID 1. Ends the sandbox if its processes together have more memory."""
    ended = os.pidfd_open(first)
    while not select.select([ended], [], [], WATCH_S)[0]:
        if sum(map(_memory, [first, *_descendants(first)])) > most_bytes:
            os.kill(first, signal.SIGKILL)
            os.waitpid(first, 0)
            return MEMORY
    return os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])


def _end_descendants() -> None:
    """Kill and reap until none is left: one that is forked while they are listed shows the next time, as a child of
    this process if its parent is dead. Gives up after END_S."""
    end = time.monotonic() + END_S
    while (left := list(_descendants(os.getpid()))) and time.monotonic() < end:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(WATCH_S)


def _descendants(pid: int) -> Iterator[int]:
    """Process ids of the children of `pid`, their children, and so on."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")  # a child belongs to the thread that forked it
    except OSError:  # it has ended
        return
    for thread in threads:
        try:
            with open(f"/proc/{pid}/task/{thread}/children") as file:
                children = [int(child) for child in file.read().split()]
        except OSError:
            continue
        for child in children:
            yield child
            yield from _descendants(child)


def _memory(pid: int) -> int:
    """Bytes of memory that are not files; 0 if the process has ended."""
    try:
        with open(f"/proc/{pid}/status") as file:
            lines = [line.split() for line in file if line.startswith(("RssAnon:", "RssShmem:"))]
    except OSError:
        return 0
    return sum(int(words[1]) << 10 for words in lines)


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    done = libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())
    _check(done, f"the kernel refused a mount ({kind or source} at {target})")


def _read_only(path: str, *, recursive: bool) -> None:
    """Raises SetupError, also on kernels before 5.12, which have no mount_setattr."""
    wanted = (ctypes.c_uint64 * 4)(ATTR_RDONLY | ATTR_NOSUID | (0 if path == "/" else ATTR_NODEV), 0, 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    done = libc.syscall(MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, ctypes.byref(wanted), ctypes.sizeof(wanted))
    _check(done, f"the kernel refused to make {path} read-only (mount_setattr)")


def _prctl(option: int, value: int, pointer: Any = None) -> None:
    done = libc.prctl(option, ctypes.c_ulong(value), pointer, ctypes.c_ulong(0), ctypes.c_ulong(0))
    _check(done, f"the kernel refused prctl {option}")


def _check(result: int, what: str) -> None:
    if result == -1:
        raise SetupError(f"{what}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    main()
