"""The driver processes of a run, one per shard. A driver that is killed is restarted and resumes from the journal.

Drivers listen on Unix-domain sockets in a folder that only this user may enter or, in a job of several nodes, on TCP.
They answer only requests with the run's secret token, which is generated here.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from collab_megatron.config.sections import DriverSection
from collab_megatron.errors import RunError
from collab_megatron.launch.child_process import ChildProcess, Ready
from collab_megatron.launch.cli import shard_file, token_file
from collab_megatron.launch.restarts import Restarts
from collab_megatron.launch.supervisor import Supervisor
from collab_megatron.launch.trainer_ranks import end_children
from collab_megatron.wire.live_file import live_file

READY_FILE = "driver"
"""With .0, .1, ... for each shard; in the scratch folder, which has a short name and also holds sockets and token."""


class Drivers:
    """The drivers of one run on this node.

    A driver that ends with an error message ends the run. One that was ended by a signal (such as the kernel's, when
    memory is short) or by an unexpected exception is restarted at the same address; a driver that hangs is killed
    first. A driver that was killed before it was ready gets --first-step again, because it may not have removed the
    lines of an earlier attempt yet."""

    def __init__(
        self,
        supervisor: Supervisor,
        section: DriverSection,
        resolved: Path,
        max_context_tokens: int,
        engine_keys: Path | None = None,
        addresses: Sequence[str] = (),
    ) -> None:
        """`engine_keys`: file of API keys (engine/keys.py); None: the engines need none. `addresses`: tcp://HOST:PORT
        of each shard; empty: Unix-domain sockets."""
        self._supervisor, self._section = supervisor, section
        self._ready_file, self._addresses = supervisor.scratch / READY_FILE, addresses
        self._argv = driver_command(resolved, max_context_tokens)
        self._keys = ["--engine-keys", str(engine_keys)] if engine_keys else []
        supervisor.publish(token_file(self._ready_file).name, secrets.token_hex(32))
        self._restarts = [Restarts(section.max_restarts) for _ in range(section.shards)]
        self._first_step: list[str] = []
        self._live_pages: dict[int, str] = {}  # addresses that were printed, by shard
        self.children: list[ChildProcess] = []

    def start(self, first_step: int) -> None:
        """Start all drivers; `first_step` is the first step of this attempt."""
        self._first_step = ["--first-step", str(first_step)]
        self.children = [self._start(shard, self._first_step) for shard in range(self._section.shards)]

    def restart(self, first_step: int, tick: Callable[[], None]) -> None:
        """End all drivers and start them again, for a trainer that goes on at an earlier step. `tick` is called
        repeatedly. Raises RunError where one does not end."""
        children, self.children = self.children, []
        end_children(self._supervisor, children, tick)
        self.start(first_step)

    def poll(self) -> None:
        """Kill drivers that hang, restart drivers that were killed, and print the addresses of their live pages. Raises
        RunError after driver.max_restarts."""
        if self._section.live_port is not None:
            self._show_live_pages()
        self._supervisor.pass_on_addresses(self.children)
        for shard, child in enumerate(self.children):
            if child.hung and child.process.poll() is None:
                print(f"killing {child.name}: {child.hung}", flush=True)
                self._supervisor.kill(child)
                child.hung = None  # the next poll finds it dead
            if not child.will_restart():  # it runs, is done, or has failed, which the supervisor handles
                continue
            if self._supervisor.is_gone(child):
                if not self._restarts[shard].take():
                    raise RunError(
                        f"{child.name} ended with {child.ended()} after {self._restarts[shard].count} restarts "
                        f"(driver.max_restarts); see {child.log}"
                    )
                print(f"{child.name} ended with {child.ended()}: restarting it", flush=True)
                was_ready = self._supervisor.was_ready(child)
                self.children[shard] = self._start(shard, [] if was_ready else self._first_step)

    def _show_live_pages(self) -> None:
        """A driver that is restarted has another key, and with driver.live_port=0 another port."""
        for shard, child in enumerate(self.children):
            file = live_file(self._supervisor.logs_dir, shard)
            if child.process.poll() is None and file.exists():
                url = json.loads(file.read_text())["url"]
                if self._live_pages.get(shard) != url:
                    self._live_pages[shard] = url
                    print(
                        f"live page of {child.name}: {url} (any user name; the password is the key in {file})",
                        flush=True,
                    )

    def _start(self, shard: int, more: Sequence[str]) -> ChildProcess:
        self._restarts[shard].begin()
        name = "driver" if self._section.shards == 1 else f"driver-{shard}"
        file = shard_file(self._ready_file, shard)
        address = self._addresses[shard] if self._addresses else f"ipc://{file}.socket"
        where = ["--shard", str(shard), "--address", address]
        ready = ["--ready-file", str(file), "--token-file", str(token_file(self._ready_file))]
        argv = [*self._argv, *where, *ready, "--logs-dir", str(self._supervisor.logs_dir), *self._keys, *more]
        return self._supervisor.start(name, argv, {}, restarted=True, ready=Ready(file=str(file)))


def driver_command(resolved: Path, max_context_tokens: int) -> list[str]:
    """The part of the command line that all drivers share."""
    module = "collab_megatron.rollout.service"
    return [sys.executable, "-m", module, str(resolved), "--max-context-tokens", str(max_context_tokens)]
