"""A launcher under way, whose processes a test may signal."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.conftest import REPOSITORY, Ended, environment
from tests.forks import Forked
from tests.warm import STARTS, read_starts, start_warm


class Running:
    """A launcher under way, with everything it has started, and a temporary folder of its own."""

    def __init__(self, argv: list[str], log: Path, warm: bool) -> None:
        self._log, self._warm = log, warm
        self.temporary = Path(tempfile.mkdtemp(prefix="test_failures_"))  # short: sockets lie in it
        env = {**environment(), "TMPDIR": str(self.temporary)}
        self._starts = self.temporary / "starts"
        self._process: subprocess.Popen[bytes] | Forked
        if warm:
            self._process = start_warm(log, argv, {**env, STARTS: str(self._starts)})
        else:
            with log.open("wb") as sink:
                self._process = subprocess.Popen(
                    [sys.executable, *argv], cwd=REPOSITORY, env=env, stdout=sink, stderr=subprocess.STDOUT
                )
        self.family: list[psutil.Process] = []

    @property
    def pid(self) -> int:
        return self._process.pid

    def shared_memory(self) -> set[Path]:
        """The files of /dev/shm that its processes have mapped."""
        maps = [line for p in self.family for line in Path(f"/proc/{p.pid}/maps").read_text().splitlines()]
        return {
            Path(line[line.index("/dev/shm/") :]) for line in maps if "/dev/shm/" in line and "(deleted)" not in line
        }

    def wait_until(self, said: str, timeout_s: float = 150) -> None:
        deadline = time.monotonic() + timeout_s
        while said not in self._log.read_text():
            assert self._process.poll() is None, self._log.read_text()[-4000:]
            assert time.monotonic() < deadline, self._log.read_text()[-4000:]
            time.sleep(0.05)
        if self._warm:
            pids = (started.pid for started in read_starts(self._starts))
            self.family = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
        else:
            self.family = psutil.Process(self._process.pid).children(recursive=True)

    def child(self, *words: str) -> psutil.Process:
        """The first started process whose command line holds all `words`."""
        return next(p for p in self.family if all(word in " ".join(p.cmdline()) for word in words))

    def started(self, module: str) -> tuple[psutil.Process, Sequence[str]]:
        """The process of `python -m MODULE` that was started last, and its command line."""
        if self._warm:
            last = next(one for one in reversed(read_starts(self._starts)) if module in one.argv)
            return psutil.Process(last.pid), last.argv
        process = self.child(module)
        return process, process.cmdline()

    def rank(self, rank: int) -> psutil.Process:
        """A trainer rank, of those that were started last."""
        if self._warm:
            started = reversed(read_starts(self._starts))
            return next(psutil.Process(one.pid) for one in started if one.rank == str(rank))
        ranks = (p for p in self.family if "--trainer-rank" in p.cmdline())
        return next(p for p in ranks if p.environ()["RANK"] == str(rank))

    def newest_step(self) -> int:
        return max(int(step) for step in re.findall(r"^rl (\d+)/", self._log.read_text(), re.MULTILINE))

    def send(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            os.kill(self.pid, number)

    def end(self, timeout_s: float = 90) -> Ended:
        code = self._process.wait(timeout_s)
        gone, alive = psutil.wait_procs(self.family, timeout=15)
        assert not alive, f"left running: {alive}"
        assert gone
        return Ended(code, self._log.read_text())
