"""Signals and parent death, for every process of a run."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from types import FrameType

from collab_megatron.errors import RunError

PR_SET_PDEATHSIG = 1  # linux/prctl.h
SAME_S = 10.0
"""Signals within this time count as one. Slurm's proctrack/linuxproc, systemd and a shutdown send a signal to every
process of a job; the launcher, which gets one too, sends its own."""


def die_with_parent() -> None:
    """Ask the kernel to TERM this process when its parent ends. Raises RunError outside Linux or if it refuses."""
    if sys.platform != "linux":
        raise RunError("only Linux can end a process with its parent: run this on Linux")
    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise RunError(f"prctl refused to tie this process to its parent ({os.strerror(ctypes.get_errno())})")
    if os.getppid() != parent:  # it ended before the prctl
        os._exit(0)


def end_at_signals(*numbers: signal.Signals) -> None:
    """Make SIGTERM, SIGHUP and `numbers` raise KeyboardInterrupt in the main thread, once in SAME_S. Ignored signals
    (nohup, a shell's background job) stay ignored."""
    last = -SAME_S

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < SAME_S:
            return
        last = now
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP, *numbers):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)
