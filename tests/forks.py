"""Ranks without the wait: a process imports torch and megatron once, and every rank is forked from it.

Those imports take 6 s of CPU, more than most ranks then work. A forked rank is a process like any other: environment,
arguments, exit code and output of its own, the script as its __main__, the interpreter's whole way out. It must not be
forked after CUDA has been touched or a thread started; neither happens while importing on a machine without CUDA.

    python tests/forks.py

answers {"start": ...} and {"poll": pid}, one JSON value a line, until its standard input ends.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]


class Forked:
    """One forked process: what run_ranks asks of a subprocess.Popen."""

    def __init__(self, parent: ForkServer, pid: int) -> None:
        self._parent, self.pid = parent, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._parent.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float = 60.0) -> int:
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise TimeoutError(f"process {self.pid} was not done after {timeout:g} s")
            time.sleep(0.02)
        return code

    def kill(self) -> None:
        if self.poll() is None:  # so its number is still its own: nobody has waited for it
            os.kill(self.pid, signal.SIGKILL)


class ForkServer:
    """The process that has imported everything; started when first asked, ends with this one."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def start(
        self, script: Path, args: Sequence[str], env: Mapping[str, str], out: Path, err: Path | None = None
    ) -> Forked:
        """`script` as `python script args` with all of `env`; stderr goes where stdout goes unless `err` is given."""
        job = [str(script), list(args), dict(env), str(out), str(err or out)]
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
        assert answer, "the process that ranks are forked from has ended; its error output is above"
        return json.loads(answer)

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-W", "ignore", __file__]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True, cwd=REPO
            )
            atexit.register(self._end)
        return self._process

    def _end(self) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


# what the scripts of tests/parallel and tests/convert import
IMPORTED = (
    "pytest",
    "collab_megatron.trainer.actor.actor",
    "collab_megatron.trainer.actor.reference",
    "collab_megatron.trainer.checkpoint.background",
    "collab_megatron.trainer.checkpoint.from_hf",
    "collab_megatron.trainer.checkpoint.store",
    "collab_megatron.trainer.checkpoint.to_hf",
    "tests.trainer.parallel.tiny",
)

# of two interpreters, so that neighbouring ranks hash strings differently, as ranks that are started one by one do
SERVERS = (ForkServer(), ForkServer())


def _serve() -> list[Any]:
    """Answer until the questions end. Returns only in a forked process, with its job."""
    with os.fdopen(os.dup(1), "w") as answers:
        for line in sys.stdin:
            question = json.loads(line)
            if "start" in question:
                pid = os.fork()
                if pid == 0:
                    return list(question["start"])
                answer: int | None = pid
            else:
                pid, status = os.waitpid(question["poll"], os.WNOHANG)
                answer = os.waitstatus_to_exitcode(status) if pid else None
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    raise SystemExit


def _become(script: str, args: list[str], env: dict[str, str], out: str, err: str) -> None:
    os.environ.clear()
    os.environ.update(env)
    for path, flags, number in ((os.devnull, os.O_RDONLY, 0), (out, os.O_WRONLY, 1), (err, os.O_WRONLY, 2)):
        opened = os.open(path, flags | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.argv = [script, *args]
    sys.path[0] = str(Path(script).parent)
    main = types.ModuleType("__main__")
    main.__file__ = script
    sys.modules["__main__"] = main
    exec(compile(Path(script).read_bytes(), script, "exec"), vars(main))


def _main() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    assert threading.active_count() == len(os.listdir("/proc/self/task")) == 1, "a thread would not survive the fork"
    gc.freeze()  # or collecting would copy every page
    _become(*_serve())


if __name__ == "__main__":
    _main()
