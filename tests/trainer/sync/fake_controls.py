"""A stand-in for EngineControl: what each server does in a call is a function of the test's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from collab_megatron.trainer.sync import servers
from collab_megatron.trainer.sync.servers import SyncServers
from collab_megatron.wire.roster import EngineEntry, RosterFolder

ENTRIES = tuple(EngineEntry(f"engine-{i}", f"http://127.0.0.1:{i + 1}", ranks=1) for i in range(3))


class FakeControl:
    """Every call is noted in `calls` as (server's URL, call); `does` may raise or block."""

    calls: list[tuple[str, str]]
    silent: set[str]  # URLs whose HTTP side does not answer
    does: Callable[[str, str], Any]

    def __init__(self, url: str, **_: Any) -> None:
        self.url = url

    def answers(self, timeout_s: float) -> bool:
        return self.url not in self.silent

    def close(self) -> None:
        return

    def __getattr__(self, call: str) -> Callable[..., Any]:
        def do(*_: Any, **__: Any) -> Any:
            self.calls.append((self.url, call))
            return type(self).does(self.url, call)

        return do


@contextmanager
def sync_servers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, entries: Sequence[EngineEntry], *, timeout_s: float = 0.5
) -> Iterator[SyncServers]:
    """SyncServers over FakeControl, with `entries` as members and short deadlines."""
    monkeypatch.setattr(servers, "EngineControl", FakeControl)
    monkeypatch.setattr(servers, "ANSWER_S", 0.3)
    monkeypatch.setattr(servers, "RELEASE_S", 3.0)
    monkeypatch.setattr(servers, "READ_ROSTER_EVERY_S", 0.01)
    for name, value in (("calls", []), ("silent", set()), ("does", staticmethod(lambda url, call: None))):
        monkeypatch.setattr(FakeControl, name, value, raising=False)
    roster = RosterFolder(folder)
    roster.publish(entries, coming=0)
    found = SyncServers(roster, timeout_s=timeout_s, wait_s=0.3)
    found.find()
    yield found
    found.close()
