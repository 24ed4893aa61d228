"""Fork server: a process imports torch, megatron or SGLang once, and the processes of many tests are forked from it.

Those imports take 6 to 20 s of CPU, more than most of these processes then work. A forked process is a process like any
other: environment, arguments, exit code and output of its own, a process group, the script or module as its __main__,
the interpreter's whole way out. The fork must not come after CUDA has been touched or a thread started; neither happens
while importing on a machine without CUDA.

    python -m tests.forks MODULE ...

imports the modules and answers {"start": ...} and {"poll": pid}, one JSON value a line, until its standard input ends.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
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


class Forked:
    """One forked process: what its starter asks of a subprocess.Popen."""

    def __init__(self, parent: ForkServer, pid: int) -> None:
        self._parent, self.pid = parent, pid
        self._polling = threading.Lock()
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with self._polling:  # the fork server can wait for a process once
            if self.returncode is None:
                self.returncode = self._parent.ask({"poll": self.pid})
            return self.returncode

    def wait(self, timeout: float = 60.0) -> int:
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.02)
        return code

    def kill(self) -> None:
        if self.poll() is None:  # so its number is still its own: nobody has waited for it
            os.kill(self.pid, signal.SIGKILL)


class ForkServer:
    """The process that has imported `modules`; started when first asked, ends with this one.

    `env`: on top of ours, for what reads the environment while it is imported.
    """

    def __init__(self, modules: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self._modules, self._env = tuple(modules), dict(env or {})
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def start(
        self, main: str | Path, args: Sequence[str], env: Mapping[str, str], out: Path, err: Path | None = None
    ) -> Forked:
        """The script or module `main` as `python main args` or `python -m main args`, in a process group of its own,
        with all of `env`; stderr goes where stdout goes unless `err` is given."""
        job = [str(main), list(args), dict(env), str(out), str(err or out)]
        return Forked(self, self.ask({"start": job}))

    def warm(self) -> None:
        """Begin to import, and do not wait for it."""
        with self._lock:
            self._running()

    def ask(self, question: dict[str, Any]) -> Any:
        with self._lock:
            pipe = self._running()
            assert pipe.stdin is not None
            assert pipe.stdout is not None
            pipe.stdin.write(json.dumps(question) + "\n")
            pipe.stdin.flush()
            answer = pipe.stdout.readline()
        assert answer, "the process that others are forked from has ended; its error output is above"
        return json.loads(answer)

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            env = {**os.environ, **self._env, "PYTHONPATH": str(REPO)}
            command = [sys.executable, "-W", "ignore", "-m", "tests.forks", *self._modules]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=env,
                text=True,
                cwd=REPO,
                start_new_session=True,  # Ctrl-C is for pytest, whose teardown needs this process
            )
            atexit.register(self._end)
        return self._process

    def _end(self) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


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


def _serve() -> list[Any]:
    """Answer until the questions end. Returns only in a forked process, with its job."""
    with os.fdopen(os.dup(1), "w") as answers:
        for line in sys.stdin:
            question = json.loads(line)
            if "start" in question:
                pid = os.fork()
                if pid == 0:
                    return list(question["start"])
                os.setpgid(pid, pid)  # here, so that the group is there when the answer is
                answer: int | None = pid
            else:
                pid, status = os.waitpid(question["poll"], os.WNOHANG)
                answer = os.waitstatus_to_exitcode(status) if pid else None
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    raise SystemExit


def _become(name: str, args: list[str], env: dict[str, str], out: str, err: str) -> None:
    die_with_parent()
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # found while importing; TMPDIR may be another one here
    for path, flags, number in ((os.devnull, os.O_RDONLY, 0), (out, os.O_WRONLY, 1), (err, os.O_WRONLY, 2)):
        opened = os.open(path, flags | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.argv = [name, *args]
    if not name.endswith(".py"):
        runpy.run_module(name, run_name="__main__", alter_sys=True)
        return
    sys.path[0] = str(Path(name).parent)
    main = types.ModuleType("__main__")
    main.__file__ = name
    sys.modules["__main__"] = main
    exec(compile(Path(name).read_bytes(), name, "exec"), vars(main))


def _main() -> None:
    for name in sys.argv[1:]:
        importlib.import_module(name)
    tasks = [task for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid())]
    threads = {(task / "comm").read_text().strip() for task in tasks} - SAFE_THREADS
    assert not threads, f"{threads} would not survive the fork"
    gc.freeze()  # or collecting would copy every page
    _become(*_serve())


if __name__ == "__main__":
    _main()
