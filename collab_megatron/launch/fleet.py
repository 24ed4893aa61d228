"""The SGLang servers of a run: started, watched, killed, started again; the roster says which of them are up.

A server has lives. The first one must come up, else the run ends with what the server said: a wrong flag must not loop.
After that a server that dies, or that trainer or driver have given up (roster.py), is killed with whatever it started
and begins another life, `engine.max_restarts` times; then it stays away. Servers given as URLs are only listed.

`poll` belongs into a loop that watches everything else of the run too, and never waits; `wait_until_ready` does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from urllib.parse import urlsplit

import httpx

from collab_megatron.config.sections import EngineSection
from collab_megatron.engine.server_args import EngineCommand
from collab_megatron.errors import RunError, UserError, masked
from collab_megatron.launch.ports import free_port
from collab_megatron.launch.readiness import ReadinessProbe
from collab_megatron.launch.supervisor import ChildProcess, Supervisor
from collab_megatron.wire.roster import EngineEntry, RosterFolder

POLL_S = 0.1
ASK_S = 1.0  # between two questions to a server that starts beside a training run
ASK_FIRST_S = 0.2  # the same while nothing else is under way
INFO_S = 10.0

BuildCommand = Callable[[int, int], EngineCommand]  # (number of the server, its port) -> what to execute


@dataclass
class _ManagedServer:
    """One server in its present life."""

    number: int
    entry: EngineEntry
    readiness: ReadinessProbe
    child: ChildProcess | None = None  # None: given by its URL, or stays away
    ready: bool = False
    killed: bool = False  # this life is over; the next begins when nobody of its group is left
    away: bool = False  # there is no next life
    began: float = field(default_factory=time.monotonic)

    @property
    def coming(self) -> bool:
        return self.child is not None and not self.ready and not self.away


class Fleet:
    """`start`, then `wait_until_ready`, then `poll` until the run ends; the supervisor ends the servers."""

    def __init__(
        self, supervisor: Supervisor, settings: EngineSection, folder: RosterFolder, build: BuildCommand
    ) -> None:
        self._supervisor = supervisor
        self._settings = settings
        self._folder = folder
        self._build = build
        self._servers: list[_ManagedServer] = []

    @property
    def urls(self) -> list[str]:
        """Of the servers that are up."""
        return [server.entry.url for server in self._servers if server.ready]

    def start(self) -> None:
        """Start the first life of every server, or take note of the given ones. Raises RunError for a full disk."""
        self._folder.clear()
        for number in range(self._settings.servers):
            name, ranks = f"engine-{number}", self._settings.tensor
            if self._settings.urls:
                url = self._settings.urls[number].rstrip("/")
                entry = EngineEntry(name, url, ranks, managed=False)
                self._servers.append(_ManagedServer(number, entry, ReadinessProbe(url, every_s=ASK_FIRST_S)))
            else:
                self._begin_life(number, EngineEntry(name, "", ranks), essential=True)
        self._publish()

    def wait_until_ready(self) -> None:
        """Until every server answered once, or `startup_timeout_s` is over.

        Raises RunError if one of ours dies before that or is late, or if anything else of the run fails; UserError if
        none of the given ones answers. Of given ones those that do not answer are left out.
        """
        deadline = time.monotonic() + self._settings.startup_timeout_s
        while waiting := [server for server in self._servers if self._never_came(server)]:
            self._supervisor.check()
            if self._settings.urls and time.monotonic() > deadline:
                self._leave_out(waiting)
                break
            self.poll()
            time.sleep(POLL_S)

    def poll(self) -> None:
        """Look after every server once; returns at once. Raises RunError as `wait_until_ready`."""
        for server in self._servers:
            if server.killed:
                self._bury(server)
            elif server.child is not None and (reason := self._over(server, server.child)):
                self._end_life(server, server.child, reason)
            elif not server.ready and not server.away and server.readiness.answers():
                self._welcome(server)

    def _never_came(self, server: _ManagedServer) -> bool:
        if server.child is None:
            return not server.entry.managed and not server.ready
        return server.child.essential

    def _over(self, server: _ManagedServer, child: ChildProcess) -> str | None:
        """Why this life is over; None: it goes on."""
        if how := child.ended():
            return f"died ({how})"
        if reason := self._folder.condemned(server.entry):
            return f"was given up ({' '.join(reason.split())})"
        if child.hung:
            return f"was given up ({child.hung})"
        limit = self._settings.startup_timeout_s
        if not server.ready and time.monotonic() - server.began > limit:
            return f"was not ready within {limit:g} s"
        return None

    def _begin_life(self, number: int, entry: EngineEntry, *, essential: bool) -> None:
        command = self._build(number, self._port(number))
        entry = replace(entry, url=command.url)
        every_s = ASK_FIRST_S if essential else ASK_S
        child = self._supervisor.start(entry.name, command.argv, command.env, essential=essential, unset=command.unset)
        server = _ManagedServer(number, entry, ReadinessProbe(command.url, every_s=every_s), child)
        self._servers[number : number + 1] = [server]

    def _end_life(self, server: _ManagedServer, child: ChildProcess, reason: str) -> None:
        """Kill it at once: a server that is given up must not answer anybody any more."""
        if child.essential:
            if child.ended() is not None:
                self._supervisor.fail(child)
            raise RunError(f"{server.entry} {reason}; see {child.log}")
        self._supervisor.kill(child)
        server.readiness.close()
        server.ready, server.killed = False, True
        limit = self._settings.max_restarts
        server.away = server.entry.life >= limit
        if server.away:
            self._say(server, f"{reason}: it stays away, engine.max_restarts={limit}; see {child.log}")
        else:
            self._say(server, f"{reason}: starting it again ({server.entry.life + 1} of {limit})")
        self._publish()

    def _bury(self, server: _ManagedServer) -> None:
        """Begin the next life once nothing is left of this one: it held ports and GPU memory."""
        assert server.child is not None
        if not self._supervisor.is_gone(server.child):
            return
        if server.away:
            server.child, server.killed = None, False
        else:
            self._begin_life(server.number, replace(server.entry, life=server.entry.life + 1), essential=False)

    def _welcome(self, server: _ManagedServer) -> None:
        if server.child is None:
            server.entry = replace(server.entry, ranks=_ranks_of(server.entry.url))
        else:
            server.child.essential = False  # from now on its death is mended
            self._supervisor.note_shared_memory()
        server.ready = True
        word = "back" if server.entry.life else "ready"
        self._say(server, f"is {word} at {server.entry.url} after {time.monotonic() - server.began:.0f} s")
        self._publish()

    def _leave_out(self, silent: list[_ManagedServer]) -> None:
        """The given servers that did not answer."""
        urls = masked(", ".join(server.entry.url for server in silent))
        limit = f"{self._settings.startup_timeout_s:g} s"
        if len(silent) == len(self._servers):
            raise UserError(f"none of engine.urls answered within {limit} ({urls}): start them, or mend the addresses")
        print(f"engine.urls: no answer within {limit} from {urls}: going on without", flush=True)
        self._servers = [server for server in self._servers if server.ready]
        self._publish()

    def _port(self, number: int) -> int:
        if self._settings.port:
            return self._settings.port + number
        taken = {urlsplit(server.entry.url).port for server in self._servers}
        while (port := free_port(self._settings.host)) in taken:
            pass  # free, because the server that it was meant for has not opened it yet
        return port

    def _publish(self) -> None:
        ready = [server.entry for server in self._servers if server.ready]
        self._folder.publish(ready, sum(server.coming for server in self._servers))

    def _say(self, server: _ManagedServer, what: str) -> None:
        print(masked(f"{server.entry.name} {what}"), flush=True)


def _ranks_of(url: str) -> int:
    """Tensor-parallel ranks of a server that was given, as it says itself. Raises RunError."""
    try:
        return int(httpx.get(f"{url}/server_info", timeout=INFO_S, trust_env=False).json()["tp_size"])
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise RunError(f"engine {url} does not say its tp_size on /server_info ({type(error).__name__})") from None
