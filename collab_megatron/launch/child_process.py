"""A process that the launcher has started, on this node or on another one."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from collab_megatron.errors import EXIT_UNEXPECTED

TAIL_LINES = 12


class Process(Protocol):
    """What is used of subprocess.Popen; a process on another node has the same (job_supervisor.py)."""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> int | None: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...


@dataclass(frozen=True)
class Ready:
    """How a process shows that it is ready: its server answers at `url`/health, or `file` is there and has its
    address."""

    url: str = ""
    file: str = ""


NOT_SHOWN = Ready()


@dataclass
class ChildProcess:
    """A process that the supervisor has started."""

    name: str
    process: Process
    log: Path | None  # None: its output goes to ours
    essential: bool = True  # its failure ends all children
    restarted: bool = False  # after a signal or an unexpected exception its starter starts it again
    saves: bool = False  # at TERM it saves a checkpoint together with the other ranks, then ends
    hung: str | None = None  # why its starter must kill it although it runs
    ready: Ready = NOT_SHOWN

    def ended(self) -> str | None:
        """How the process ended ("exit code 1", "signal SIGKILL"); None while it runs."""
        code = self.process.poll()
        if code is None:
            return None
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    @property
    def lost(self) -> str:
        """Why its node is lost, where nothing can be started any more; empty while it is not, and for a process on this
        node."""
        return str(getattr(self.process, "lost", ""))

    def will_restart(self) -> bool:
        """Whether its starter starts it again after this end."""
        code = self.process.poll() or 0
        return self.restarted and not self.lost and (code < 0 or code == EXIT_UNEXPECTED)


def tail(log: Path) -> list[str]:
    """The last lines of a log."""
    return log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
