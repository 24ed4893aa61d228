"""Programs in the sandbox, and what they may leave behind."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import replace
from pathlib import Path

from collab_megatron.rollout.sandbox.sandbox import Sandbox, SandboxLimits, SandboxRun

LIMITS = SandboxLimits(time_s=30.0, memory_mb=256, processes=32, disk_mb=16, output_mb=1)
HURRIED = replace(LIMITS, time_s=1.0)


def processes_of(name: str) -> list[str]:
    """Process ids whose command line has `name`, without this process."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if name.encode() in (folder / "cmdline").read_bytes():
                    found.append(folder.name)
            except OSError:
                continue
    return found


def wait_for(name: str) -> None:
    end = time.monotonic() + 15
    while not processes_of(name):
        assert time.monotonic() < end
        time.sleep(0.05)


def run(sandbox: Sandbox, code: str, given: bytes = b"", mark: str = "") -> SandboxRun:
    return asyncio.run(sandbox.run(("-I", "-c", code, mark), given))
