"""A run of two real servers and one trainer rank in this process, assembled as the launcher and train_rl.py do."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from collab_megatron.config.sections import EngineSection, ParallelSection, SyncSection
from collab_megatron.engine.control import EngineControl
from collab_megatron.engine.server_args import EngineCommand, engine_command
from collab_megatron.launch.child_process import ChildProcess
from collab_megatron.launch.fleet import Fleet
from collab_megatron.launch.supervisor import Supervisor
from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.actor.grid import close_grid, init_grid
from collab_megatron.trainer.sync.publisher import Publisher, SyncReport
from collab_megatron.wire.roster import EngineEntry, RosterFolder
from tests.engine.real_servers import end_at_once, server_supervisor
from tests.trainer.parallel.tiny import make_model

START_S = 400.0
TIMEOUT_S = 10.0  # of a call: the time that a hung server costs
NUM_TENSORS = 14  # of the tiny model, as the server holds it
PROMPT = (3, 40, 41, 42, 2)
ENGINE = EngineSection(count=2, max_total_tokens=4096, max_running_requests=8, max_restarts=9, startup_timeout_s=2)


@dataclass
class Run:
    """Two servers, watched and restarted, and a trainer."""

    root: Path
    roster: RosterFolder
    supervisor: Supervisor
    publisher: Publisher
    actor: Actor
    version: int = 0

    def child(self, name: str) -> ChildProcess:
        """The newest life of a server."""
        return next(child for child in reversed(self.supervisor._children) if child.name.startswith(name))

    def signal(self, name: str, number: signal.Signals) -> None:
        """Signal the server and all its ranks, as when a node is lost."""
        os.killpg(self.child(name).process.pid, number)

    def cpu_s(self, name: str) -> float:
        """CPU seconds of the server's processes so far."""
        group = str(self.child(name).process.pid)
        ticks = 0
        for file in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has ended in the meantime
                fields = file.read_text().rpartition(")")[2].split()  # from the 3rd on (proc_pid_stat(5))
                if fields[2] == group:
                    ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def change(self) -> None:
        """Change the weights, as an optimizer step does."""
        with torch.no_grad():
            for parameter in self.actor.chunks[0].parameters():
                parameter.mul_(1.01)
        self.version += 1

    def publish(self) -> SyncReport:
        """Change the weights and publish them."""
        self.change()
        return self.publisher.publish(self.version)

    def publisher_of(self, **sync: Any) -> Publisher:
        """Another publisher over the same servers, with the settings `sync`."""
        return make_publisher(self.actor, self.roster.folder, self.root, **sync)

    def wait_until_both_are_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while len(self.roster.read().ready) < 2:
            assert time.monotonic() < deadline, f"the lost server did not come back: {self.roster.read()}"
            time.sleep(0.2)

    def probe(self, entry: EngineEntry) -> tuple[str, list[int]]:
        """(weight version, greedy reply) of a server."""
        control = EngineControl(entry.url, timeout_s=30)
        try:
            reply, _ = control.greedy(PROMPT, max_new_tokens=16, stop_token_ids=[])
            return control.weight_version(), reply
        finally:
            control.close()

    def serving_alike(self, publisher: Publisher | None = None) -> list[int]:
        """Both serve the newest version; their greedy reply to PROMPT."""
        first, second = (self.probe(entry) for entry in (publisher or self.publisher).servers.live)
        assert first == second
        assert first[0] == str(self.version)
        return first[1]


def make_publisher(actor: Actor, roster: Path, run_dir: Path, **sync: Any) -> Publisher:
    return Publisher(
        actor,
        roster=roster,
        engine=ENGINE,
        sync=SyncSection(timeout_s=TIMEOUT_S, bucket_mb=0.03, verify_every=1, **sync),
        probe_ids=list(range(5, 45)),
        weights_dir=run_dir / "weights",
    )


@contextmanager
def running(root: Path) -> Iterator[Run]:
    """From the start of the servers to their end."""
    model = make_model(root / "model", "llama", max_position_embeddings=4096, eos_token_id=None)
    roster = RosterFolder(root / "engines")

    def build(number: int, port: int) -> EngineCommand:
        return engine_command(
            ENGINE, model_path=str(model), dtype="float32", device="cpu", port=port, seed=1, number=number
        )

    over = threading.Event()
    with server_supervisor(root / "logs") as supervisor:
        fleet = Fleet(supervisor, ENGINE.model_copy(update={"startup_timeout_s": START_S}), roster, build)
        fleet.start()
        fleet.wait_until_ready()

        def watch() -> None:
            reported: set[int] = set()
            while not over.wait(0.1):
                for child in supervisor._children:  # of a server that nobody killed its log's end is all there is
                    if child.ended() and child.process.pid not in reported and child.log is not None:
                        reported.add(child.process.pid)
                        lines = child.log.read_text(errors="replace").splitlines()[-40:]
                        print(child.name, child.ended(), *lines, sep="\n")
                fleet.poll()

        watcher = threading.Thread(target=watch)
        watcher.start()
        grid = init_grid(ParallelSection(device="cpu"), seed=1)
        actor = Actor.build(model, dtype="float32", grid=grid, optimizer=None)
        publisher = make_publisher(actor, roster.folder, root)
        try:
            yield Run(root, roster, supervisor, publisher, actor)
        finally:
            publisher.close()
            close_grid()
            over.set()
            watcher.join()
            end_at_once(supervisor)
