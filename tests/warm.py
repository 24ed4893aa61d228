"""Whole runs without their imports: launcher, drivers, trainer ranks and SGLang servers are forked (tests/forks.py).

Of the 20 s that two cores take to the first step of a small run, imports are 17. These processes, their arguments,
environments, outputs and ends are those of a cold run. Only their parents differ: each is a child of the fork server
that has its imports, and ends with its launcher all the same. A job of many nodes, train_sft in
test_seed_commands.py, and in test_failures.py the runs whose processes are looked at start cold; with make test-full
the demo too.

    python -m tests.warm SOCKETS [-m] MODULE_OR_SCRIPT ...

runs in a process that is forked from COMMANDS. SOCKETS: JSON, module -> socket of the fork server for it. If its
environment has WARM_STARTS, a line is added to this file for each process: its id, its command, its rank.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from collab_megatron.demo import pipeline
from collab_megatron.launch import supervisor
from tests.forks import Connection, Forked, ForkServer

COMMANDS = ForkServer(["tests.warm_preload"], {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"})
HERE = "tests.warm"
OURS = (HERE, *(f"collab_megatron.{name}" for name in ("train_rl", "train_sft", "train_dpo", "rollout.service")))
STARTS = "WARM_STARTS"


class Started(NamedTuple):
    """A process that a launcher has had forked: its command line in /proc is that of the fork server."""

    pid: int
    argv: tuple[str, ...]
    rank: str | None


def start_warm(log: Path, argv: Sequence[str], env: Mapping[str, str], sglang: ForkServer | None = None) -> Forked:
    """`python *argv` in the repository's root; its output is appended to `log`. Its servers start cold without
    `sglang`."""
    servers = dict.fromkeys(OURS, COMMANDS) | ({"sglang.launch_server": sglang} if sglang else {})
    sockets = {module: str(server.warm().path) for module, server in servers.items()}
    return COMMANDS.start(HERE, [json.dumps(sockets), *argv], env, log)


def run_warm(log: Path, argv: Sequence[str], env: Mapping[str, str], sglang: ForkServer, timeout_s: float) -> int:
    """The exit code of `start_warm`."""
    process = start_warm(log, argv, env, sglang)
    try:
        return process.wait(timeout_s)
    finally:
        process.kill()  # what it has started ends with it


class _Subprocess(types.SimpleNamespace):
    """In the place of the module subprocess in supervisor.py: processes of `connections`' modules are forked."""

    def __init__(self, connections: Mapping[str, Connection]) -> None:
        super().__init__(**{name: getattr(subprocess, name) for name in subprocess.__all__})
        self._connections = connections
        self.Popen = self._start

    def _start(self, argv: Sequence[str], **options: Any) -> Forked | subprocess.Popen[bytes]:
        python, m, module, *args = argv
        if (python, m) != (sys.executable, "-m") or module not in self._connections:
            return subprocess.Popen(argv, **options)
        out = options["stdout"]
        outs = (1, 2) if out is None else (out.fileno(), out.fileno())
        started = self._connections[module].start(module, args, options["env"], *outs, *options["pass_fds"])
        if STARTS in os.environ:
            line = Started(started.pid, tuple(argv), options["env"].get("RANK"))
            with Path(os.environ[STARTS]).open("a") as file:
                file.write(json.dumps(line) + "\n")
        return started


def read_starts(file: Path) -> list[Started]:
    """What WARM_STARTS names holds."""
    if not file.exists():
        return []
    return [Started(pid, tuple(argv), rank) for pid, argv, rank in map(json.loads, file.read_text().splitlines())]


def _main() -> None:
    sockets, *words = sys.argv[1:]
    opened = {path: Connection(Path(path)) for path in json.loads(sockets).values()}
    connections = {module: opened[path] for module, path in json.loads(sockets).items()}

    def call(argv: Sequence[str], folder: Path, env: Mapping[str, str]) -> int:
        """A stage of a pipeline."""
        assert folder == Path.cwd()
        return connections[HERE].start(HERE, [sockets, *argv[1:]], env, 1, 2).wait(None)

    launching, stages = vars(supervisor), vars(pipeline)
    launching["subprocess"], stages["_call"] = _Subprocess(connections), call
    is_module = words[0] == "-m"
    name, *args = words[is_module:]
    sys.argv = [name, *args]
    if is_module:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(name).resolve().parent))
        runpy.run_path(name, run_name="__main__")


if __name__ == "__main__":
    _main()
