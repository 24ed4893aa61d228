"""Memory of GPUs that trainer and engines share: who gives it back, when, and in which order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from collab_megatron.config.sections import EngineSection, SyncSection
from collab_megatron.engine.client import EngineGone
from collab_megatron.errors import NoEngineLeft
from collab_megatron.trainer.actor.agreement import RankFailure
from collab_megatron.trainer.sync import publisher as publisher_module
from collab_megatron.trainer.sync.attempt import Attempt
from collab_megatron.trainer.sync.publisher import Publisher
from collab_megatron.trainer.sync.servers import MEMORY_TAGS, EnginesLost, SyncServers
from collab_megatron.wire.roster import EngineEntry
from tests.trainer.sync.fake_controls import ENTRIES, FakeControl, sync_servers


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SyncServers]:
    with sync_servers(tmp_path, monkeypatch, ENTRIES[:2]) as found:
        found.live = found.members
        yield found


def test_servers_release_memory_only_after_an_abort_and_a_flush_that_found_them_idle(servers: SyncServers) -> None:
    FakeControl.does = staticmethod(lambda url, call: call == "flush_cache")
    servers.release_memory()
    for entry in ENTRIES[:2]:
        calls = [call for url, call in FakeControl.calls if url == entry.url]
        assert calls == ["pause", "flush_cache", "release_memory"]


def test_a_server_that_stays_busy_is_given_up_and_not_asked_for_its_memory(servers: SyncServers) -> None:
    FakeControl.does = staticmethod(lambda url, call: call == "flush_cache" and url == ENTRIES[0].url)
    servers.release_memory()
    assert servers.members == ENTRIES[:1]
    assert (ENTRIES[1].url, "release_memory") not in FakeControl.calls
    FakeControl.does = staticmethod(lambda url, call: False)
    with pytest.raises(EnginesLost):
        servers.release_memory()


def test_no_server_is_asked_twice_for_memory(servers: SyncServers) -> None:
    """sglang 0.5.23 ends at the second call (weight_updater.py: offload_tags.remove)."""
    FakeControl.does = staticmethod(lambda url, call: call == "flush_cache" and url == ENTRIES[0].url)
    servers.release_memory()  # repeated without the server that is lost
    assert FakeControl.calls.count((ENTRIES[0].url, "release_memory")) == 1
    publisher: Any = object.__new__(Publisher)
    publisher._servers, publisher._released = servers, {(ENTRIES[0], tag) for tag in MEMORY_TAGS}
    for tag in ("weights", "weights", "kv_cache"):  # an attempt, and another one
        publisher._resume_memory(tag)
    assert FakeControl.calls.count((ENTRIES[0].url, "resume_memory")) == 2


@pytest.mark.parametrize(
    ("placement", "device"), [("colocated", "cuda"), ("disaggregated", "cuda"), ("colocated", "cpu")]
)
def test_every_rank_empties_its_cache_before_the_engines_take_memory_back(
    monkeypatch: pytest.MonkeyPatch, placement: Any, device: str
) -> None:
    order: list[str] = []
    for call in ("ipc_collect", "empty_cache"):
        monkeypatch.setattr(torch.cuda, call, lambda call=call: order.append(call))
    monkeypatch.setattr(dist, "barrier", lambda **_: order.append("barrier"))

    def probe(*_: Any) -> list[float]:
        order.append("probe")
        return [0.0]

    def find() -> None:
        raise _Found

    monkeypatch.setattr(publisher_module, "trainer_logprobs", probe)

    publisher: Any = object.__new__(Publisher)
    grid = SimpleNamespace(device=torch.device(device), world_size=1)
    publisher._actor, publisher._engine = SimpleNamespace(grid=grid), EngineSection(placement=placement)
    publisher._probe_ids, publisher._all_ranks, publisher._find = (1, 2), None, find
    with pytest.raises(_Found):
        publisher.publish(1)
    shares = placement == "colocated" and device == "cuda"
    assert order == ["probe", *(["ipc_collect", "empty_cache"] if shares else []), "barrier"]


class _Found(Exception):
    """The engines are looked for now."""


class _Delivered(Exception):
    """The first attempt that sends weights."""


def delivering(monkeypatch: pytest.MonkeyPatch, grid: Any) -> tuple[Any, list[Any]]:
    """A publisher whose `publish` ends in _Delivered, and the members of what it delivered."""
    monkeypatch.setattr(publisher_module, "trainer_logprobs", lambda *_: [0.0])
    monkeypatch.setattr(publisher_module, "units_of_sync", lambda *_: frozenset())
    monkeypatch.setattr(dist, "barrier", lambda **_: None)
    publisher: Any = object.__new__(Publisher)
    publisher._actor = SimpleNamespace(grid=grid, spec=None)
    publisher._engine, publisher._sync = EngineSection(placement="colocated"), SyncSection()
    publisher._probe_ids, publisher._all_ranks, publisher._store = (1, 2), None, None
    publisher._attempts, publisher._syncs, publisher._seen, publisher._released = 0, 0, set(), set()
    found: list[Any] = []

    def deliver(attempt: Attempt, *_: Any) -> None:
        found.append(attempt.members)
        raise _Delivered

    publisher._servers, publisher._deliver = None, deliver
    return publisher, found


@pytest.mark.parametrize("lost", [ENTRIES[:1], ENTRIES[:2]])
def test_a_server_lost_while_it_takes_memory_back_is_lost_before_any_rank_sends(
    servers: SyncServers, monkeypatch: pytest.MonkeyPatch, lost: tuple[EngineEntry, ...]
) -> None:
    """Rank 0. Alone in skipping the delivery, it would leave the other ranks in gathers."""

    def does(url: str, call: str) -> None:
        if call == "resume_memory" and url in [entry.url for entry in lost]:
            raise EngineGone(f"engine {url} is gone during resume_memory")

    FakeControl.does = staticmethod(does)
    grid = SimpleNamespace(device=torch.device("cpu"), world_size=1, rank=0)
    publisher, found = delivering(monkeypatch, grid)
    publisher._servers = servers
    publisher._released = {(entry, tag) for entry in ENTRIES[:2] for tag in MEMORY_TAGS}
    left = tuple(entry for entry in ENTRIES[:2] if entry not in lost)
    with pytest.raises(_Delivered if left else NoEngineLeft):
        publisher.publish(1)
    assert found == ([left] if left else [])


def test_other_ranks_start_over_where_rank_0_lost_all_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    news: list[list[Any]] = [[None, RankFailure(EnginesLost, "all lost")], [ENTRIES[:2], None]]

    def broadcast(outcome: list[Any], **_: Any) -> None:
        outcome[:] = news.pop(0)

    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    grid = SimpleNamespace(device=torch.device("cpu"), world_size=2, rank=1, is_main=False, cpu_group=None)
    publisher, found = delivering(monkeypatch, grid)
    with pytest.raises(_Delivered):
        publisher.publish(1)
    assert found == [ENTRIES[:2]]
    assert not news
