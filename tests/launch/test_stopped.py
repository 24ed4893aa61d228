"""Stopped processes of a run are noticed, of any kind; real processes, and a made-up /proc for the clock."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from collab_megatron.errors import RunError
from collab_megatron.launch.stopped import LONGEST_LOOK_S, ProcessStat, StoppedWatch, all_processes
from collab_megatron.launch.supervisor import Supervisor

SLEEP = "import time; time.sleep(60)"
# what is stopped is not the child itself, but one that it started: an engine's scheduler or detokenizer, a writer
WITH_A_HELPER = f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{SLEEP}'])"


class Proc:
    """A made-up /proc, and a clock."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.found: list[ProcessStat] = []
        self.watch = StoppedWatch(10, look=lambda: self.found, clock=lambda: self.now)

    def after(self, seconds: float) -> dict[int, str]:
        self.now += seconds
        return self.watch.over([7, 8])


def test_a_process_is_over_the_limit_once_it_was_seen_stopped_for_so_long() -> None:
    proc = Proc()
    proc.found = [
        ProcessStat(70, "scheduler", "T", 7),
        ProcessStat(80, "python", "S", 8),
        ProcessStat(90, "vim", "T", 9),
    ]
    assert proc.after(1000) == {}  # the first look: nobody knows since when
    assert [proc.after(3) for _ in range(3)] == [{}, {}, {}]
    assert proc.after(0.5) == {}  # not looked at
    assert proc.after(0.5) == {
        7: "process 70 (scheduler) has been stopped by a signal for 10 s (run.stopped_timeout_s=10)"
    }
    proc.found = [
        ProcessStat(70, "scheduler", "R", 7),
        ProcessStat(80, "python", "t", 8),
    ]  # goes on; in a debugger's hands
    assert proc.after(4) == {}
    proc.found = [ProcessStat(70, "scheduler", "T", 7)]
    assert [proc.after(4) for _ in range(3)] == [{}, {}, {}]
    assert list(proc.after(4)) == [7]


def test_while_we_were_stopped_ourselves_nothing_counts() -> None:
    """A job manager that suspends a job stops all of its processes, and lets all go on."""
    proc = Proc()
    proc.found = [ProcessStat(70, "scheduler", "T", 7)]
    proc.after(0)
    assert proc.after(3600) == {}
    proc.found = []
    assert proc.after(1) == {}
    assert LONGEST_LOOK_S < 10


def test_processes_are_read_from_proc() -> None:
    me = psutil.Process()
    (found,) = [process for process in all_processes() if process.pid == me.pid]
    assert found == ProcessStat(me.pid, found.name, "R", os.getpgrp())
    assert me.name().startswith(found.name)


def until(state: Callable[[], object], within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while not state():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def stop_helper_of(pid: int) -> int:
    until(lambda: psutil.Process(pid).children())
    (helper,) = psutil.Process(pid).children()
    helper.suspend()
    return helper.pid


@pytest.mark.slow
def test_a_stopped_rank_ends_everything_and_is_named(tmp_path: Path) -> None:
    said = (
        r"trainer-1 is given up: process \d+ \(.*\) has been stopped by a signal for \d+ s \(run.stopped_timeout_s=1\)"
    )
    # it would save: TERM reaches it though it is stopped
    saves = f"import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('saved'))); {SLEEP}"
    with pytest.raises(RunError, match=said), Supervisor(tmp_path, stopped_timeout_s=1) as supervisor:
        ranks = [supervisor.start(f"trainer-{rank}", [sys.executable, "-uc", saves], {}, saves=True) for rank in (0, 1)]
        until(lambda: all(_catches_term(rank.process.pid) for rank in ranks))
        os.kill(ranks[1].process.pid, signal.SIGSTOP)
        supervisor.wait_for(ranks, timeout_s=60)
    assert [(tmp_path / f"trainer-{rank}.log").read_text() for rank in (0, 1)] == ["saved\n", "saved\n"]


def _catches_term(pid: int) -> bool:
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt")]
    return bool(int(line.split()[1], 16) & 1 << signal.SIGTERM - 1)


@pytest.mark.slow
def test_one_that_is_started_again_is_only_marked(tmp_path: Path) -> None:
    with Supervisor(tmp_path, stopped_timeout_s=1) as supervisor:
        child = supervisor.start("engine-0", [sys.executable, "-c", WITH_A_HELPER], {}, essential=False)
        helper = stop_helper_of(child.process.pid)
        until(lambda: supervisor.check() or child.hung)  # type: ignore[func-returns-value]
        assert child.hung is not None
        assert child.hung.startswith(f"process {helper} (python")
