"""The driver processes of a run: one a shard, started again where one is killed; it goes on from the journal.

They listen on Unix-domain sockets in a folder that only this user may enter, and answer only requests that carry a
token made here, once a run.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from collab_megatron.config.sections import DriverSection
from collab_megatron.errors import RunError
from collab_megatron.files import publish_secret
from collab_megatron.launch.cli import shard_file, token_file
from collab_megatron.launch.supervisor import ChildProcess, Supervisor


class Drivers:
    """Those of one run on this node. A driver that ends by itself with an error ends the run; one that a signal (the
    kernel's, when memory is short) or an exception that nobody expected ended is started again at the same address, and
    so is one that hangs, after it is killed. One that was killed before it was ready is told the attempt's first step
    again: it may not have seen to the lines of an earlier attempt yet."""

    def __init__(
        self,
        supervisor: Supervisor,
        section: DriverSection,
        resolved: Path,
        max_context_tokens: int,
        ready_file: Path,
        engine_keys: Path | None = None,
    ) -> None:
        """`ready_file`: in a folder with a short name and mode 0700; sockets and token lie there, too. `engine_keys`:
        file of engine/keys.py, where the engines ask for keys."""
        self._supervisor, self._section, self._ready_file = supervisor, section, ready_file
        self._argv = driver_command(resolved, max_context_tokens)
        self._keys = ["--engine-keys", str(engine_keys)] if engine_keys else []
        publish_secret(token_file(ready_file), secrets.token_hex(32))
        self._restarts = [0] * section.shards
        self._first_step: list[str] = []
        self.children: list[ChildProcess] = []

    def start(self, first_step: int) -> None:
        """All of them; `first_step` is the attempt's."""
        self._first_step = ["--first-step", str(first_step)]
        self.children = [self._start(shard, self._first_step) for shard in range(self._section.shards)]

    def poll(self) -> None:
        """Kill those that hang, and start those again that were killed. Raises RunError when one was killed too
        often."""
        for shard, child in enumerate(self.children):
            if child.hung and child.process.poll() is None:
                print(f"{child.name} is killed: {child.hung}", flush=True)
                self._supervisor.kill(child)
                child.hung = None  # the next look finds it dead
            if not child.comes_again():  # runs, is done, or has failed: the supervisor sees to that
                continue
            if self._restarts[shard] >= self._section.max_restarts:
                raise RunError(
                    f"{child.name} ended with {child.ended()} and was started again {self._restarts[shard]} times "
                    f"already (driver.max_restarts); see {child.log}"
                )
            if self._supervisor.is_gone(child):
                self._restarts[shard] += 1
                print(f"{child.name} ended with {child.ended()}: it is started again", flush=True)
                was_ready = shard_file(self._ready_file, shard).exists()
                self.children[shard] = self._start(shard, [] if was_ready else self._first_step)

    def _start(self, shard: int, more: Sequence[str]) -> ChildProcess:
        name = "driver" if self._section.shards == 1 else f"driver-{shard}"
        file = shard_file(self._ready_file, shard)
        where = ["--shard", str(shard), "--address", f"ipc://{file}.socket"]
        ready = ["--ready-file", str(file), "--token-file", str(token_file(self._ready_file))]
        return self._supervisor.start(name, [*self._argv, *where, *ready, *self._keys, *more], {}, restarted=True)


def driver_command(resolved: Path, max_context_tokens: int) -> list[str]:
    """What all of them have in common."""
    module = "collab_megatron.rollout.service"
    return [sys.executable, "-m", module, str(resolved), "--max-context-tokens", str(max_context_tokens)]
