"""Memory of GPUs that trainer and engines share: who gives it back, when, and in which order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from collab_megatron.config.sections import EngineSection
from collab_megatron.trainer.sync import publisher as publisher_module
from collab_megatron.trainer.sync.publisher import Publisher
from collab_megatron.trainer.sync.servers import EnginesLost, SyncServers
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
