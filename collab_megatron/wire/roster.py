"""Which servers of a run are up: a file that the launcher writes and the trainer reads, and the way back.

The launcher alone starts and ends servers; the trainer alone decides which of them are used, by syncing them. A server
that trainer or driver gave up on is condemned: a marker that makes the launcher kill it and start it anew.
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
    """One life of one server. A restarted server is another entry: `life` is counted up."""

    name: str  # engine-0
    url: str
    ranks: int  # tensor-parallel ranks
    life: int = 0
    managed: bool = True  # started by us: can be killed and started again

    def __str__(self) -> str:
        return f"{self.name} ({self.url})"


@dataclass(frozen=True)
class Roster:
    """The servers that answer, and those that may yet come (starting, or between two lives)."""

    ready: tuple[EngineEntry, ...]
    coming: int  # servers that are being started; 0 with `ready` empty: nobody will ever come


class RosterFolder:
    """The folder through which launcher and trainer speak of the servers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def clear(self) -> None:
        """Take away what an earlier attempt left: its servers are gone, and its markers would condemn ours."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def publish(self, ready: Sequence[EngineEntry], coming: int) -> None:
        """Written by the launcher whenever something changed."""
        publish_json(self.folder / ROSTER_FILE, {"ready": [asdict(entry) for entry in ready], "coming": coming})

    def read(self) -> Roster:
        """Nothing ready and one coming while the launcher has not written yet."""
        path = self.folder / ROSTER_FILE
        if not path.exists():
            return Roster(ready=(), coming=1)
        said = json.loads(path.read_text())
        return Roster(ready=tuple(EngineEntry(**entry) for entry in said["ready"]), coming=said["coming"])

    def condemn(self, entry: EngineEntry, reason: str) -> None:
        """Ask the launcher to kill this life of a server. No life is asked for twice; URLs given by the user are only
        marked."""
        publish_text(self._marker(entry), reason + "\n")

    def condemned(self, entry: EngineEntry) -> str | None:
        """Why this life was given up; None: it was not."""
        path = self._marker(entry)
        return path.read_text().strip() if path.exists() else None

    def _marker(self, entry: EngineEntry) -> Path:
        return self.folder / "condemned" / f"{entry.name}.{entry.life}"
