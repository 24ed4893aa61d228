"""One call to all servers: who is given up, who is not, and what the caller hears. No server runs here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from collab_megatron.engine.client import EngineGone, EngineRefused, EngineSilent
from collab_megatron.errors import NoEngineLeft, RunError, WeightsDiffer
from collab_megatron.trainer.sync.attempt import Abandoned
from collab_megatron.trainer.sync.servers import EnginesLost, SyncServers
from collab_megatron.wire.roster import RosterFolder
from tests.trainer.sync.fake_controls import ENTRIES, FakeControl, sync_servers

FIRST, SECOND, THIRD = ENTRIES


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SyncServers]:
    with sync_servers(tmp_path, monkeypatch, ENTRIES) as servers:
        yield servers


def first_server(do: Callable[[], Any]) -> None:
    """The first server does `do` in every call; the others answer "well"."""
    FakeControl.does = staticmethod(lambda url, _: do() if url == FIRST.url else "well")


def failing(error: Exception) -> Callable[[], None]:
    def do() -> None:
        raise error

    return do


def call(servers: SyncServers) -> dict[Any, Any]:
    return servers.call_all("the call", lambda control, _: control.resume())


def test_all_answers_come_back(found: SyncServers) -> None:
    FakeControl.does = staticmethod(lambda url, _: url)
    assert call(found) == {entry: entry.url for entry in ENTRIES}


def test_a_dead_server_is_given_up_and_its_life_condemned(found: SyncServers, tmp_path: Path) -> None:
    first_server(failing(EngineGone("engine-0 is gone during the call")))
    with pytest.raises(EnginesLost, match="the call: servers were lost"):
        call(found)
    assert found.members == (SECOND, THIRD)
    assert RosterFolder(tmp_path).condemned(FIRST) == "engine-0 is gone during the call"
    assert found.take_lost() == {str(FIRST): "engine-0 is gone during the call"}
    assert found.take_lost() == {}
    assert found.find() == (SECOND, THIRD), "it is in the roster, but this life of it is not used again"


def test_a_refusal_is_no_reason_to_give_a_server_up(found: SyncServers) -> None:
    first_server(failing(EngineRefused("engine-0 refused the call: no memory")))
    with pytest.raises(RunError, match="no memory") as caught:
        call(found)
    assert not isinstance(caught.value, EnginesLost)
    assert found.members == ENTRIES


@pytest.mark.parametrize("other", [EngineGone("engine-1 is gone"), EngineRefused("engine-1 refused"), None])
def test_a_call_that_ended_because_the_attempt_was_abandoned_hides_no_reason(
    found: SyncServers, other: Exception | None
) -> None:
    def does(url: str, _: str) -> None:
        if url == FIRST.url:
            raise Abandoned
        if url == SECOND.url and other is not None:
            raise other

    FakeControl.does = staticmethod(does)
    expected = {EngineGone: EnginesLost, EngineRefused: EngineRefused, type(None): Abandoned}[type(other)]
    with pytest.raises(expected):
        call(found)
    assert FIRST in found.members


def test_what_a_call_raises_about_an_answer_comes_first(found: SyncServers) -> None:
    first_server(failing(WeightsDiffer("engine-0 holds other weights")))
    with pytest.raises(WeightsDiffer):
        call(found)
    assert found.members == ENTRIES


@pytest.mark.parametrize(("http_answers", "reason"), [(False, "silent during"), (True, "did not come back from")])
@pytest.mark.slow
def test_a_server_that_hangs_is_given_up(found: SyncServers, http_answers: bool, reason: str) -> None:
    over = threading.Event()
    first_server(lambda: over.wait(30))
    if not http_answers:
        FakeControl.silent.add(FIRST.url)
    with pytest.raises(EnginesLost):
        call(found)
    over.set()
    assert found.members == (SECOND, THIRD)
    assert found.take_lost()[str(FIRST)].startswith(f"{reason} the call")


def test_a_server_whose_scheduler_alone_hangs_is_given_up(found: SyncServers) -> None:
    first_server(failing(EngineSilent("engine-0 did not answer the call")))
    with pytest.raises(EnginesLost):
        call(found)
    assert found.members == (SECOND, THIRD)


def test_servers_that_waited_for_a_dead_one_are_released_and_kept(found: SyncServers) -> None:
    released = threading.Event()

    def do(url: str, _: str) -> None:
        if url == FIRST.url:
            raise EngineGone("engine-0 is gone")
        assert released.wait(30)
        raise EngineRefused("the group was closed")

    FakeControl.does = staticmethod(do)
    with pytest.raises(EnginesLost):
        found.call_all("the call", lambda control, _: control.resume(), on_failure=released.set)
    assert found.members == (SECOND, THIRD)


def test_survivors_are_called_again(found: SyncServers) -> None:
    first_server(failing(EngineGone("engine-0 is gone")))
    answers = found.call_survivors("the call", lambda control, _: control.resume())
    assert answers == {SECOND: "well", THIRD: "well"}


def test_no_server_answers(found: SyncServers) -> None:
    FakeControl.silent |= {entry.url for entry in ENTRIES}
    with pytest.raises(
        NoEngineLeft, match=r"no engine is left, and none came within 0.3 s \(engine-0 .*did not answer"
    ):
        found.find()
