"""Engine roster: a file in which the launcher lists the running engine servers, and markers of servers to restart.

Only the launcher starts and stops servers. Only the trainer decides which servers are used, by syncing weights to them.
A server that trainer or driver gave up on is condemned: a marker file makes the launcher kill and restart it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from collab_megatron.files import publish_json, publish_text

ROSTER_FILE = "roster.json"


@dataclass(frozen=True)
class EngineEntry:
    """One life of one server. A restarted server is a new entry with a higher `life`."""

    name: str  # engine-0
    url: str  # empty until the server of another node is up
    ranks: int  # tensor-parallel ranks
    life: int = 0
    managed: bool = True  # started by the launcher, which can restart it

    def __str__(self) -> str:
        return f"{self.name} ({self.url})" if self.url else self.name


@dataclass(frozen=True)
class Roster:
    """The servers that are ready, and the number of servers that are starting."""

    ready: tuple[EngineEntry, ...]
    coming: int  # servers that are starting; 0 and an empty `ready`: there will be no server


class RosterFolder:
    """The folder of roster and markers, shared by launcher and trainer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def clear(self) -> None:
        """Remove the files of an earlier attempt. Its markers would condemn servers of this one."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def publish(self, ready: Sequence[EngineEntry], coming: int) -> None:
        """Write the roster. The launcher calls this after every change."""
        publish_json(self.folder / ROSTER_FILE, {"ready": [asdict(entry) for entry in ready], "coming": coming})

    def read(self) -> Roster:
        """The roster. Before the launcher's first write: none ready, one coming."""
        path = self.folder / ROSTER_FILE
        if not path.exists():
            return Roster(ready=(), coming=1)
        content = json.loads(path.read_text())
        return Roster(ready=tuple(EngineEntry(**entry) for entry in content["ready"]), coming=content["coming"])

    def condemn(self, entry: EngineEntry, reason: str) -> None:
        """Ask the launcher to restart this server. Servers at URLs of the user get the marker only."""
        publish_text(self._marker(entry), reason + "\n")

    def condemned(self, entry: EngineEntry) -> str | None:
        """The reason why this life of the server was condemned; None if it was not."""
        path = self._marker(entry)
        return path.read_text().strip() if path.exists() else None

    def _marker(self, entry: EngineEntry) -> Path:
        return self.folder / "condemned" / f"{entry.name}.{entry.life}"
