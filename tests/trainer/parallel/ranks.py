"""Real gloo processes for a test: N copies of a script, a deadline, and the failing rank's traceback.

    run_ranks("grpo_ranks.py", 2, str(model_folder), "--tensor=2")

The script reads RANK and WORLD_SIZE as any trainer rank does. Each rank's output goes to a file: no pipe fills up.
Where torch knows CUDA each rank is an interpreter started for it; elsewhere it is forked (tests/forks.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from collab_megatron.launch.ports import free_port
from tests.forks import REPO, Forked, ForkServer

FORK = torch.version.cuda is None
# what the scripts of tests/trainer import
IMPORTED = (
    "pytest",
    "collab_megatron.trainer.actor.actor",
    "collab_megatron.trainer.actor.reference",
    "collab_megatron.trainer.checkpoint.async_save",
    "collab_megatron.trainer.checkpoint.from_hf",
    "collab_megatron.trainer.checkpoint.save_load",
    "collab_megatron.trainer.checkpoint.to_hf",
    "tests.trainer.parallel.tiny",
)
# of two interpreters, so that neighbouring ranks hash strings differently, as ranks that are started one by one do
SERVERS = tuple(ForkServer(IMPORTED, {"OMP_NUM_THREADS": "1"}) for _ in range(2))
Started = list[subprocess.Popen[bytes] | Forked]


class RanksFailed(AssertionError):
    """A rank ended with an error or the deadline passed; the message holds the failing ranks' output."""


def start_ranks(script: Path, args: Sequence[str], outs: Sequence[Path], errs: Sequence[Path] | None = None) -> Started:
    """As many ranks of `script` as there are files for what they say; errors go there too unless `errs` is given."""
    ranks, port = len(outs), free_port()
    if FORK:
        for server in SERVERS[:ranks]:
            server.warm()
    started: Started = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        env = {
            **os.environ,
            **{name: str(value) for name, value in place.items()},
            "MASTER_ADDR": "127.0.0.1",
            "PYTHONPATH": str(REPO),
            "OMP_NUM_THREADS": "1",
        }
        out, err = outs[rank], errs[rank] if errs else None
        if FORK:
            started.append(SERVERS[rank % len(SERVERS)].start(script, args, env, out, err))
            continue
        with out.open("w") as to_out, (err or Path(os.devnull)).open("w") as to_err:
            command = [sys.executable, "-W", "ignore", str(script), *args]
            stderr = to_err if err else subprocess.STDOUT
            started.append(subprocess.Popen(command, stdout=to_out, stderr=stderr, env=env))
    return started


def run_ranks(script: Path, ranks: int, *args: str, deadline_s: float = 240.0) -> list[str]:
    """Run `script` on `ranks` processes; returns each rank's output, or raises RanksFailed and leaves no process."""
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank{rank}" for rank in range(ranks)]
        processes = start_ranks(script, args, logs)
        end = time.monotonic() + deadline_s
        try:
            # a rank that failed leaves the others waiting for it: stop at the first
            while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
                if time.monotonic() > end:
                    break
                time.sleep(0.05)
            late = [rank for rank, p in enumerate(processes) if p.poll() is None]
            failed = [rank for rank, p in enumerate(processes) if p.poll()]
        finally:
            for p in processes:
                p.kill()
                p.wait()
        texts = [log.read_text(errors="replace") for log in logs]
    if failed:
        raise RanksFailed("\n".join(f"--- rank {r} of {ranks} ---\n{texts[r][-4000:]}" for r in failed))
    if late:
        raise RanksFailed(
            "\n".join(f"--- rank {r} was not done after {deadline_s} s ---\n{texts[r][-2000:]}" for r in late)
        )
    return texts


@dataclass(frozen=True)
class Ran:
    """What came of a script; several processes' output one after the other, the first code that is not 0."""

    returncode: int
    stdout: str
    stderr: str


def run_script(script: Path, *args: str | Path, ranks: int = 1, deadline_s: float = 180.0) -> Ran:
    """A script to its end, whatever that is, as many times as torchrun would start it."""
    with tempfile.TemporaryDirectory() as folder:
        outs, errs = ([Path(folder) / f"{rank}.{what}" for rank in range(ranks)] for what in ("out", "err"))
        started = start_ranks(script, [str(arg) for arg in args], outs, errs)
        try:
            codes = [process.wait(timeout=deadline_s) for process in started]
        finally:
            for process in started:
                process.kill()
                process.wait()
        said, complained = ("".join(file.read_text() for file in files) for files in (outs, errs))
    return Ran(next(filter(None, codes), 0), said, complained)
