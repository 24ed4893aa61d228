"""Client of the math worker (math_worker.py): compares two expressions within a deadline.

A comparison that does not end in time costs the worker its life and is `unknown`; the next one starts another worker.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Literal, cast

Verdict = Literal["equal", "different", "unknown"]
WORKER = Path(__file__).with_name("math_worker.py")
START_S = 60.0  # imports of sympy and ANTLR; a busy machine takes long
GRACE_S = 1.0  # beyond the worker's own alarm
REMEMBERED = 4096  # verdicts


class MathChecker:
    """One worker process, started by the first comparison. It may be used from any event loop and thread."""

    def __init__(self, *, timeout_s: float = 3.0, memory_mb: int = 2048) -> None:
        self._timeout_s, self._memory_mb = timeout_s, memory_mb
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[str] | None = None
        self._known: OrderedDict[tuple[str, str], Verdict] = OrderedDict()

    async def compare(self, reference: str, answer: str) -> Verdict:
        """Waits for the worker, `timeout_s` at most once it has started. Raises RuntimeError if it cannot start."""
        key = (reference, answer)
        if key not in self._known:
            self._known[key] = await asyncio.to_thread(self._ask, *key)
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        return self._known[key]

    def _ask(self, reference: str, answer: str) -> Verdict:
        with self._lock:
            worker = self._worker or self._start()
            assert worker.stdin is not None, "it is a pipe"
            try:
                worker.stdin.write(json.dumps([reference, answer]) + "\n")
                worker.stdin.flush()
            except BrokenPipeError:  # it died since the last comparison
                self._end(worker)
                return "unknown"
            line = _line(worker, self._timeout_s + GRACE_S)
            if line not in ("equal", "different", "unknown"):
                self._end(worker)
                return "unknown"
            return cast(Verdict, line)

    def _start(self) -> subprocess.Popen[str]:
        worker = subprocess.Popen(
            [sys.executable, "-P", str(WORKER), str(self._timeout_s), str(self._memory_mb)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},  # no keys
            text=True,
        )
        if _line(worker, START_S) != "ready":
            worker.kill()
            worker.wait()
            raise RuntimeError(f"{WORKER.name} did not start in {START_S:g} s: is math-verify installed?")
        self._worker = worker
        weakref.finalize(self, worker.kill)
        return worker

    def _end(self, worker: subprocess.Popen[str]) -> None:
        worker.kill()
        worker.wait()
        self._worker = None


def _line(worker: subprocess.Popen[str], timeout_s: float) -> str:
    """The worker's next line; empty if it died or did not answer. It writes whole lines, so one read has one."""
    assert worker.stdout is not None, "it is a pipe"
    ready, _, _ = select.select([worker.stdout], [], [], timeout_s)
    return worker.stdout.readline().strip() if ready else ""
