"""A supervisor whose `python -m` processes are forked from one that has done the imports: ready in a tenth of a second.

A driver spends seconds on imports, and a test that starts twenty of them has none to spare. They are processes like any
others: own group, killed by -9, ended with their parent.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from collab_megatron.launch.supervisor import ChildProcess, Supervisor

PRELOAD = ["tests.rollout.preload"]


class WarmSupervisor(Supervisor):
    """Starts `PYTHON -m MODULE ...` and nothing else, with our environment as it was at the first start."""

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
    ) -> ChildProcess:
        assert list(argv[:2]) == [sys.executable, "-m"], argv
        assert not any((env, show, saves, unset))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        log = self._logs_dir / f"{name}.log"
        process = context.Process(target=_run, args=(list(argv[2:]), log))
        process.start()
        child = ChildProcess(name, cast("subprocess.Popen[bytes]", _Forked(process)), log, essential, restarted)
        self._children.append(child)
        return child


class _Forked:
    """A process with what ChildProcess wants of a subprocess.Popen."""

    def __init__(self, process: Any) -> None:
        self._process = process
        self.pid: int = process.pid

    def poll(self) -> int | None:
        return cast("int | None", self._process.exitcode)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout or 0.0)
        return code


def _run(argv: list[str], log: Path) -> None:
    """In the forked process."""
    os.setsid()
    with log.open("ab") as sink:
        for stream in (1, 2):
            os.dup2(sink.fileno(), stream)
    module, *_ = sys.argv = argv
    runpy.run_module(module, run_name="__main__", alter_sys=True)
