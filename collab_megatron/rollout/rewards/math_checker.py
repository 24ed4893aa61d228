"""Client of the math workers (math_worker.py): compares two expressions within a deadline.

A comparison that does not end in time is `unknown`, and has kept its worker busy for timeout_s. So each worker has a
thread of its own: asyncio's default pool, which others use too, never waits for one, and while one worker is stuck the
other goes on.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Literal, cast

Verdict = Literal["equal", "different", "unknown"]
Pair = tuple[str, str]  # reference, answer
Questions = SimpleQueue[tuple[Pair, "Future[Verdict]"] | None]  # None: there are no more
WORKER = Path(__file__).with_name("math_worker.py")
WORKERS = 2
START_S = 60.0  # imports of sympy and ANTLR; a busy machine takes long
GRACE_S = 1.0  # beyond the worker's own alarm
REMEMBERED = 4096  # verdicts


class MathChecker:
    """At most WORKERS processes, each started by the first comparison that finds the others busy. It may be used from
    any event loop and thread. Equal comparisons are computed once."""

    def __init__(self, *, timeout_s: float = 3.0, memory_mb: int = 2048) -> None:
        self._timeout_s, self._memory_mb = timeout_s, memory_mb
        self._lock = threading.Lock()
        self._known: OrderedDict[Pair, Future[Verdict]] = OrderedDict()
        self._questions: Questions = SimpleQueue()
        self._threads = self._unanswered = 0
        weakref.finalize(self, _end_threads, self._questions)

    async def compare(self, reference: str, answer: str) -> Verdict:
        """Waits for earlier comparisons where all workers are busy, then for its own, at most timeout_s once the worker
        has started. Raises RuntimeError if it cannot start."""
        return await asyncio.wrap_future(self._asked((reference, answer)))

    def _asked(self, pair: Pair) -> Future[Verdict]:
        with self._lock:
            known = self._known.get(pair)
            if known is not None and not (known.done() and known.exception()):
                return known
            asked = self._known[pair] = Future[Verdict]()
            asked.set_running_or_notify_cancel()  # one waiter's cancellation must not be that of the others
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
            self._unanswered += 1
            if self._threads < min(self._unanswered, WORKERS):
                self._threads += 1
                worker = _Worker(self._timeout_s, self._memory_mb)
                # a daemon: the end of a run does not wait for a comparison
                threading.Thread(target=_answer, args=(self._questions, worker), name="math", daemon=True).start()
        asked.add_done_callback(self._one_less)
        self._questions.put((pair, asked))
        return asked

    def _one_less(self, _: Future[Verdict]) -> None:
        with self._lock:
            self._unanswered -= 1


def _answer(questions: Questions, worker: _Worker) -> None:
    """A worker's thread. It waits for comparisons, and ends with its MathChecker."""
    while (question := questions.get()) is not None:
        pair, asked = question
        try:
            asked.set_result(worker.compare(pair))
        except Exception as error:  # noqa: BLE001 - the one that asked gets it
            asked.set_exception(error)
    worker.end()


def _end_threads(questions: Questions) -> None:
    for _ in range(WORKERS):
        questions.put(None)


class _Worker:
    """One process and its child."""

    def __init__(self, timeout_s: float, memory_mb: int) -> None:
        self._timeout_s, self._memory_mb = timeout_s, memory_mb
        self._process: subprocess.Popen[str] | None = None

    def compare(self, pair: Pair) -> Verdict:
        process = self._started()
        assert process.stdin is not None, "it is a pipe"
        try:
            process.stdin.write(json.dumps(pair) + "\n")
            process.stdin.flush()
        except BrokenPipeError:  # it died since the last comparison
            self.end()
            return "unknown"
        line = _line(process, self._timeout_s + GRACE_S)
        if line not in ("equal", "different", "unknown"):
            self.end()
            return "unknown"
        return cast(Verdict, line)

    def _started(self) -> subprocess.Popen[str]:
        """The process, started if there is none. Raises RuntimeError if that fails."""
        if self._process is not None:
            return self._process
        process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER), str(self._timeout_s), str(self._memory_mb)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},  # no keys
            text=True,
            process_group=0,
        )
        weakref.finalize(self, _kill, process)
        if _line(process, START_S) != "ready":
            _kill(process)
            raise RuntimeError(f"{WORKER.name} did not start in {START_S:g} s: is math-verify installed?")
        self._process = process
        return process

    def end(self) -> None:
        if self._process is not None:
            _kill(self._process)
            self._process = None


def _kill(process: subprocess.Popen[str]) -> None:
    """With its child."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _line(process: subprocess.Popen[str], timeout_s: float) -> str:
    """The process's next line; empty if it died or did not answer. It writes whole lines, so one read has one."""
    assert process.stdout is not None, "it is a pipe"
    ready, _, _ = select.select([process.stdout], [], [], timeout_s)
    return process.stdout.readline().strip() if ready else ""
