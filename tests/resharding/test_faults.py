"""Servers that die, hang or get wrong bytes around a sync: real ones, started and restarted by the run's own fleet."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from collab_megatron.actor.actor import Actor
from collab_megatron.actor.grid import close_grid, init_grid
from collab_megatron.cluster.fleet import Fleet
from collab_megatron.cluster.processes import Child, Supervisor
from collab_megatron.config.sections import EngineSection, ParallelSection, SyncSection
from collab_megatron.convert.buckets import Bucket
from collab_megatron.engine.control import EngineControl
from collab_megatron.engine.roster import EngineEntry, RosterFolder
from collab_megatron.engine.server_args import engine_command
from collab_megatron.errors import NoEngineLeft, RunError
from collab_megatron.resharding.delivery import BucketDelivery
from collab_megatron.resharding.publisher import Publisher
from tests.parallel.tiny import make_model

START_S = 400.0
TIMEOUT_S = 10.0  # of a call: what a hung server costs
NUM_TENSORS = 14  # of the tiny model, as the server holds it


@dataclass
class Run:
    """Two servers and a trainer of one rank, in this process."""

    roster: RosterFolder
    supervisor: Supervisor
    publisher: Publisher
    actor: Actor
    version: int = 0
    offered: list[int] = field(default_factory=list)

    def child(self, name: str) -> Child:
        """The newest life of a server."""
        return next(child for child in reversed(self.supervisor._children) if child.name.startswith(name))

    def signal(self, name: str, number: signal.Signals) -> None:
        """To the server and all its ranks, as when a node is lost."""
        os.killpg(self.child(name).process.pid, number)

    def publish(self):  # type: ignore[no-untyped-def]
        with torch.no_grad():
            for parameter in self.actor.chunks[0].parameters():
                parameter.mul_(1.01)
        self.version += 1
        return self.publisher.publish(self.version)

    def wait_until_both_are_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while len(self.roster.read().ready) < 2:
            assert time.monotonic() < deadline, f"the lost server did not come back: {self.roster.read()}"
            time.sleep(0.2)

    def says(self, entry: EngineEntry) -> tuple[str, list[int]]:
        """(weight version, greedy reply) of a server."""
        control = EngineControl(entry.url, timeout_s=30)
        try:
            reply = control.generate([3, 40, 41, 42, 2], max_new_tokens=16, stop_token_ids=[])
            return control.weight_version(), reply
        finally:
            control.close()

    def serving_alike(self) -> None:
        """Both serve the newest version."""
        first, second = (self.says(entry) for entry in self.publisher.receivers.live)
        assert first == second
        assert first[0] == str(self.version)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    root = tmp_path_factory.mktemp("faults")
    model = make_model(root / "model", "llama")
    section = EngineSection(count=2, max_total_tokens=4096, max_running_requests=8, max_restarts=9, wait_s=5)
    roster = RosterFolder(root / "engines")

    def build(number: int, port: int):  # type: ignore[no-untyped-def]
        return engine_command(
            section, model_path=str(model), dtype="float32", device="cpu", port=port, seed=1, number=number
        )

    over = threading.Event()
    with Supervisor(root / "logs") as supervisor:
        fleet = Fleet(supervisor, section.model_copy(update={"startup_timeout_s": START_S}), roster, build)
        fleet.start()
        fleet.wait_until_ready()

        def watch() -> None:
            while not over.wait(0.1):
                fleet.poll()

        watcher = threading.Thread(target=watch)
        watcher.start()
        grid = init_grid(ParallelSection(device="cpu"), seed=1)
        actor = Actor.build(model, dtype="float32", grid=grid, optimizer=None)
        publisher = Publisher(
            actor,
            roster=roster.folder,
            engine=section,
            sync=SyncSection(timeout_s=TIMEOUT_S, bucket_mb=0.03, verify_every=1),
            probe_ids=list(range(5, 45)),
            run_dir=root,
        )
        try:
            yield Run(roster, supervisor, publisher, actor)
        finally:
            publisher.close()
            close_grid()
            over.set()
            watcher.join()


@pytest.fixture
def both(run: Run) -> Run:
    """The run with two servers that hold the same, newest version."""
    run.wait_until_both_are_ready()
    report = run.publish()
    assert (report.engines, report.checked) == (2, NUM_TENSORS)
    return run


@pytest.fixture
def at_bucket(both: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[Tensor], None]], None]:
    """`at_bucket(n, do)`: when bucket n is handed over, `do(its bytes)` first."""
    delivery = both.publisher._delivery
    assert isinstance(delivery, BucketDelivery)
    offer = delivery._transport.offer
    due: dict[int, Callable[[Tensor], None]] = {}

    def offer_after(bucket: Bucket, flat: Tensor) -> Callable[[], bool]:
        if do := due.pop(bucket.number, None):
            do(flat)
        return offer(bucket, flat)

    monkeypatch.setattr(delivery._transport, "offer", offer_after)
    return due.__setitem__


def test_killed_before_a_sync(both: Run) -> None:
    both.signal("engine-1", signal.SIGKILL)
    report = both.publish()
    assert report.engines == 1
    assert [entry.name for entry in both.publisher.receivers.live] == ["engine-0"]
    both.wait_until_both_are_ready()
    assert len(both.publisher.live_urls) == 1, "a restarted server is not used before it has the weights"
    report = both.publish()
    assert (report.engines, report.checked) == (2, NUM_TENSORS)
    both.serving_alike()


def test_killed_in_the_middle_of_a_sync(both: Run, at_bucket: Callable[..., None]) -> None:
    at_bucket(3, lambda flat: both.signal("engine-0", signal.SIGKILL))
    start = time.monotonic()
    report = both.publish()
    assert (report.engines, report.attempts) == (1, 2)
    assert any(server.startswith("engine-0") for server in report.lost)
    assert time.monotonic() - start < 60
    (survivor,) = both.publisher.receivers.live
    assert survivor.name == "engine-1"
    assert both.says(survivor)[0] == str(both.version)
    both.wait_until_both_are_ready()
    both.publish()
    both.serving_alike()


def test_hangs_in_the_middle_of_a_sync(both: Run, at_bucket: Callable[..., None]) -> None:
    at_bucket(2, lambda flat: both.signal("engine-1", signal.SIGSTOP))
    report = both.publish()
    assert (report.engines, report.attempts) == (1, 2)
    assert "silent during bucket 2" in next(why for server, why in report.lost.items() if "engine-1" in server)
    both.wait_until_both_are_ready()  # the fleet has killed it and begun another life
    both.publish()
    both.serving_alike()


def test_killed_after_a_sync_the_driver_reports_it(both: Run) -> None:
    lost = both.publisher.receivers.live[0]
    both.signal(lost.name, signal.SIGKILL)
    both.publisher.forget({lost.url: "gone during generate"})
    assert lost.url not in both.publisher.live_urls
    assert both.roster.condemned(lost) == "gone during generate"
    assert both.publish().engines >= 1


def test_a_flipped_bit_stops_the_run_and_the_next_sync_mends_it(both: Run, at_bucket: Callable[..., None]) -> None:
    def flip(flat: Tensor) -> None:
        flat[100] ^= 1

    delivery = both.publisher._delivery
    assert isinstance(delivery, BucketDelivery)
    at_bucket(1, flip)
    with pytest.raises(RunError, match=r"engine-\d .* tensor-parallel rank 0.*model\.layers\.0\."):
        both.publish()
    assert both.publish().engines == 2
    both.serving_alike()


def test_no_engine_left(both: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(both.publisher.receivers, "_wait_s", 1.0)
    for name in ("engine-0", "engine-1"):
        both.signal(name, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(NoEngineLeft, match="none came within 1 s"):
        both.publish()
    assert time.monotonic() - start < 30
    monkeypatch.setattr(both.publisher.receivers, "_wait_s", START_S)
    assert both.publish().engines >= 1  # it waits for the first one that comes back
