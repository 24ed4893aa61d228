"""Fork server: a process imports torch, megatron or SGLang once, and the processes of many tests are forked from it.

Those imports take 6 to 20 s of CPU, more than most of these processes then work. A forked process is a process like any
other: environment, arguments, exit code and output of its own, a process group, the script or module as its __main__,
the interpreter's whole way out. The fork must not come after CUDA has been touched or a thread started; neither happens
while importing on a machine without CUDA.

    python -m tests.forks SOCKET MODULE ...

imports the modules and answers {"start": ...} and {"poll": pid}, one JSON value a packet, on a listening Unix-domain
socket, its open file SOCKET, until the first to connect is gone. An answer repeats the question's number. A start comes
with the open files that the new process gets: stdout, stderr, and others that it keeps open. What a connection has
started ends with it.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from collab_megatron.launch.child_process import NOT_SHOWN, ChildProcess, Ready
from collab_megatron.launch.supervisor import Supervisor
from collab_megatron.signals import die_with_parent

REPO = Path(__file__).resolve().parents[1]
SAFE_THREADS = frozenset({"jemalloc_bg_thd"})
"""pyarrow's allocator stops its own thread before a fork and starts it again after it."""


MOST_BYTES, MOST_FILES = 2**20, 16
"""Of one packet: an environment and a command line, and the files of a process."""


class Forked:
    """One forked process: what its starter asks of a subprocess.Popen."""

    def __init__(self, parent: Connection, pid: int) -> None:
        self._parent, self.pid = parent, pid
        self._polling = threading.Lock()
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with self._polling:  # the fork server can wait for a process once
            if self.returncode is None:
                self.returncode = self._parent.ask({"poll": self.pid})
            return self.returncode

    def wait(self, timeout: float | None = 60.0) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if end is not None and timeout is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.02)
        return code

    def kill(self) -> None:
        if self.poll() is None:  # so its number is still its own: nobody has waited for it
            os.kill(self.pid, signal.SIGKILL)


class Connection:
    """To a fork server that listens at `path`; opened when first asked. What it has started ends with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket: socket.socket | None = None
        self._number = 0  # of the newest question
        self._lock = threading.Lock()

    def start(self, main: str | Path, args: Sequence[str], env: Mapping[str, str], *files: int) -> Forked:
        """The script or module `main` as `python main args` or `python -m main args`, in a process group of its own,
        with all of `env`, our folder and umask; of the open files, the first two are its stdout and stderr."""
        umask = os.umask(0o077)
        os.umask(umask)
        job = {"main": str(main), "args": list(args), "env": dict(env), "folder": str(Path.cwd()), "umask": umask}
        return Forked(self, self.ask({"start": job}, files))

    def ask(self, question: dict[str, Any], files: Sequence[int] = ()) -> Any:
        with self._lock:
            if self._socket is None:
                self._socket = self._connect()
            self._number += 1
            socket.send_fds(self._socket, [json.dumps({**question, "number": self._number}).encode()], files)
            number = None
            while number != self._number:  # a signal's exception may have left an earlier answer unread
                packet = self._socket.recv(MOST_BYTES)
                assert packet, "the process that others are forked from has ended; its error output is above"
                number, answer = json.loads(packet)
        return answer

    def _connect(self) -> socket.socket:
        opened = _packets()
        opened.connect(str(self.path))
        return opened


class ForkServer:
    """The process that has imported `modules`; started when first asked, ends with this one.

    `env`: on top of ours, for what reads the environment while it is imported.
    """

    def __init__(self, modules: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self._modules, self._env = tuple(modules), dict(env or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._lock = threading.Lock()

    def start(
        self, main: str | Path, args: Sequence[str], env: Mapping[str, str], out: Path, err: Path | None = None
    ) -> Forked:
        """As Connection.start; stdout and stderr are appended to files, stderr to that of stdout unless `err` is
        given."""
        with out.open("ab") as to_out, (err or out).open("ab") as to_err:
            return self.warm().start(main, args, env, to_out.fileno(), to_err.fileno())

    def warm(self) -> Connection:
        """Begin to import, and do not wait for it."""
        with self._lock:
            if self._connection is None:
                self._connection = self._begin()
            return self._connection

    def _begin(self) -> Connection:
        folder = Path(tempfile.mkdtemp(prefix="forks_"))  # 0700
        connection = Connection(folder / "socket")
        with _packets() as listener:
            listener.bind(str(connection.path))
            listener.listen()
            connection._socket = connection._connect()  # the first
            env = {**os.environ, **self._env, "PYTHONPATH": str(REPO)}
            number = listener.fileno()
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "tests.forks", str(number), *self._modules],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=env,
                cwd=REPO,
                pass_fds=[number],
                start_new_session=True,  # Ctrl-C is for pytest, whose teardown needs this process
            )
        atexit.register(self._end)
        return connection

    def _end(self) -> None:
        assert self._process is not None
        assert self._connection is not None
        assert self._connection._socket is not None
        self._connection._socket.close()
        self._process.wait(timeout=30)
        shutil.rmtree(self._connection.path.parent)


class ForkingSupervisor(Supervisor):
    """A supervisor whose `python -m MODULE ...` processes are forked from `server`: ready without the imports."""

    def __init__(self, server: ForkServer, logs_dir: Path) -> None:
        super().__init__(logs_dir)
        self._server = server

    def start(
        self,
        name: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        *,
        show: bool = False,
        essential: bool = True,
        restarted: bool = False,
        saves: bool = False,
        unset: Sequence[str] = (),
        ready: Ready = NOT_SHOWN,
    ) -> ChildProcess:
        python, m, module, *args = argv
        assert (python, m) == (sys.executable, "-m"), argv
        assert not any((show, saves, unset))
        log = self._logs_dir / f"{name}.log"
        process = self._server.start(module, args, {**os.environ, "TMPDIR": str(self.scratch), **env}, log)
        child = ChildProcess(name, cast("subprocess.Popen[bytes]", process), log, essential, restarted, ready=ready)
        self._children.append(child)
        return child


def _packets() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MOST_BYTES)
    return made


def _serve(listener: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Answer until the first connection ends. Returns only in a forked process, with its job and open files."""
    started: dict[socket.socket, set[int]] = {}
    ended: dict[int, int] = {}  # exit codes, which are asked for again where an answer was not read
    with selectors.DefaultSelector() as waiting:
        waiting.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in waiting.select():
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    started[connection] = set()
                    waiting.register(connection, selectors.EVENT_READ)
                    continue
                connection = cast(socket.socket, key.fileobj)
                packet = b""
                files: list[int] = []
                with contextlib.suppress(ConnectionResetError):  # its process was killed
                    packet, files, _, _ = socket.recv_fds(connection, MOST_BYTES, MOST_FILES)
                if not packet:
                    if connection is next(iter(started)):
                        raise SystemExit
                    waiting.unregister(connection)
                    connection.close()
                    _end_all(started.pop(connection))
                    continue
                question = json.loads(packet)
                if "start" in question:
                    pid = os.fork()
                    if pid == 0:
                        for other in (listener, *started):
                            other.close()
                        return question["start"], files
                    os.setpgid(pid, pid)  # here, so that the group is there when the answer is
                    started[connection].add(pid)
                    ended.pop(pid, None)  # the number is in use again
                    for file in files:
                        os.close(file)
                    answer: int | None = pid
                else:
                    if question["poll"] not in ended:
                        pid, status = os.waitpid(question["poll"], os.WNOHANG)  # 0: it still runs
                        if pid:
                            ended[pid] = os.waitstatus_to_exitcode(status)
                            started[connection].discard(pid)
                    answer = ended.get(question["poll"])
                with contextlib.suppress(BrokenPipeError):  # killed while it waited: the next packet is its end
                    connection.send(json.dumps([question["number"], answer]).encode())


def _end_all(groups: set[int]) -> None:
    for group in groups:
        os.killpg(group, signal.SIGKILL)
        os.waitpid(group, 0)


def _become(job: Mapping[str, Any], files: Sequence[int]) -> None:
    die_with_parent()
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["folder"])
    os.umask(job["umask"])
    tempfile.tempdir = None  # found while importing; TMPDIR may be another one here
    for number, file in enumerate(files[:2], start=1):
        os.dup2(file, number)
        os.close(file)
    name = job["main"]
    sys.argv = [name, *job["args"]]
    if not name.endswith(".py"):
        runpy.run_module(name, run_name="__main__", alter_sys=True)
        return
    sys.path[0] = str(Path(name).parent)
    main = types.ModuleType("__main__")
    main.__file__ = name
    sys.modules["__main__"] = main
    exec(compile(Path(name).read_bytes(), name, "exec"), vars(main))


def _main() -> None:
    number, *modules = sys.argv[1:]
    for name in modules:
        importlib.import_module(name)
    tasks = [task for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid())]
    threads = {(task / "comm").read_text().strip() for task in tasks} - SAFE_THREADS
    assert not threads, f"{threads} would not survive the fork"
    gc.freeze()  # or collecting would copy every page
    _become(*_serve(socket.socket(fileno=int(number))))


if __name__ == "__main__":
    _main()
