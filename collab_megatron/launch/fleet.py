"""The SGLang servers of a run: started, watched, killed and restarted. The roster lists the servers that are up.

The first start of a server must succeed, else the run ends with the server's error: a wrong flag must not restart
forever. Later, a server that dies, or that trainer or driver have given up (wire/roster.py), is killed with all its
processes and restarted, at most `engine.max_restarts` times in a row. Servers given as URLs are only listed.

`poll` never waits; call it in the loop that watches the rest of the run. `wait_until_ready` waits.
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
from collab_megatron.launch.child_process import ChildProcess, Ready
from collab_megatron.launch.readiness import Readiness, ReadinessProbe
from collab_megatron.launch.restarts import Restarts
from collab_megatron.launch.supervisor import Supervisor
from collab_megatron.wire.roster import EngineEntry, RosterFolder

POLL_S = 0.1
ASK_S = 1.0  # between two requests to a server that starts during training
ASK_FIRST_S = 0.2  # the same while nothing else runs
INFO_S = 10.0

# (number of the server, its port) -> command line. Port 0: the agent of the server's node chooses one
BuildCommand = Callable[[int, int], EngineCommand]


@dataclass
class _ManagedServer:
    """One server, from one start to its end."""

    number: int
    entry: EngineEntry
    readiness: Readiness
    restarts: Restarts
    child: ChildProcess | None = None  # None: given by its URL, or abandoned
    ready: bool = False
    killed: bool = False  # the next start comes when no process of its group is left
    abandoned: bool = False  # no next start
    again: bool = False  # after `Fleet.restart`
    began: float = field(default_factory=time.monotonic)

    @property
    def coming(self) -> bool:
        return self.child is not None and not self.ready and not self.abandoned


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
        """URLs of the servers that are up."""
        return [server.entry.url for server in self._servers if server.ready]

    def start(self) -> None:
        """Start every server, or list the given ones. Raises RunError for a full disk."""
        self._folder.clear()
        for number in range(self._settings.servers):
            name, ranks = f"engine-{number}", self._settings.tensor
            if self._settings.urls:
                url = self._settings.urls[number].rstrip("/")
                entry = EngineEntry(name, url, ranks, managed=False)
                readiness = ReadinessProbe(url, every_s=ASK_FIRST_S)
                self._servers.append(_ManagedServer(number, entry, readiness, Restarts(limit=0)))
            else:
                self._start_server(number, EngineEntry(name, "", ranks))
        self._publish()

    def wait_until_ready(self, tick: Callable[[], None] = lambda: None) -> None:
        """Wait until every server has answered once, at most `startup_timeout_s`. `tick` is called repeatedly.

        Raises RunError if a server that we started dies or is late, or another child fails; UserError if none of the
        given servers answers. Given servers that do not answer are left out.
        """
        deadline = time.monotonic() + self._settings.startup_timeout_s
        while waiting := [server for server in self._servers if self._never_answered(server)]:
            self._supervisor.check()
            if self._settings.urls and time.monotonic() > deadline:
                self._leave_out(waiting)
                break
            self.poll()
            tick()
            time.sleep(POLL_S)

    def poll(self) -> None:
        """Check every server once; never waits. Raises RunError as `wait_until_ready`."""
        for server in self._servers:
            if server.killed:
                self._restart_when_gone(server)
            elif server.child is not None and (reason := self._failure(server, server.child)):
                self._kill_server(server, server.child, reason)
            elif not server.ready and not server.abandoned and server.readiness.answers():
                self._mark_ready(server)

    def restart(self, reason: str) -> None:
        """Start all servers of ours again, without counting it. Then `wait_until_ready`."""
        for server in self._servers:
            if server.child is not None and not server.killed:
                self._supervisor.kill(server.child)
                server.readiness.close()
                server.ready, server.killed = False, True
                server.again = True
                self._say(server, f"{reason}: restarting it")
        self._publish()

    def _never_answered(self, server: _ManagedServer) -> bool:
        if server.child is None:
            return not server.entry.managed and not server.ready
        return server.child.essential or (server.again and not server.ready and not server.abandoned)

    def _failure(self, server: _ManagedServer, child: ChildProcess) -> str | None:
        """Why the server must be killed; None: it is fine."""
        if child.lost:
            return f"is gone: {child.lost}"
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

    def _start_server(self, number: int, entry: EngineEntry, before: _ManagedServer | None = None) -> None:
        """before: the server that it replaces; without one it is the first, which must come up."""
        essential = before is None
        command = self._build(number, self._port(number))
        every_s = ASK_FIRST_S if essential else ASK_S
        child = self._supervisor.start(
            entry.name, command.argv, command.env, essential=essential, unset=command.unset, ready=Ready(command.url)
        )
        readiness = self._supervisor.readiness(child, every_s=every_s)
        restarts = Restarts(self._settings.max_restarts) if before is None else before.restarts
        restarts.begin()
        server = _ManagedServer(number, replace(entry, url=readiness.url), readiness, restarts, child)
        server.again = before is not None and before.again
        self._servers[number : number + 1] = [server]

    def _kill_server(self, server: _ManagedServer, child: ChildProcess, reason: str) -> None:
        """At once: a server that is given up must not answer requests any more."""
        if child.essential:
            if child.ended() is not None:
                self._supervisor.fail(child)
            raise RunError(f"{server.entry} {reason}; see {child.log}")
        self._supervisor.kill(child)
        server.readiness.close()
        server.ready, server.killed = False, True
        limit = self._settings.max_restarts
        server.abandoned = bool(child.lost) or not server.restarts.take()
        if child.lost:
            self._say(server, reason)
        elif server.abandoned:
            self._say(server, f"{reason}: not restarted (engine.max_restarts={limit}); see {child.log}")
        else:
            self._say(server, f"{reason}: restarting it ({server.restarts.count} of {limit})")
        self._publish()

    def _restart_when_gone(self, server: _ManagedServer) -> None:
        """Wait until the old processes have ended, because they hold ports and GPU memory."""
        assert server.child is not None
        if not self._supervisor.is_gone(server.child):
            return
        if server.abandoned:
            server.child, server.killed = None, False
        else:
            entry = replace(server.entry, life=server.entry.life + 1)
            self._start_server(server.number, entry, server)

    def _mark_ready(self, server: _ManagedServer) -> None:
        if server.child is None:
            server.entry = replace(server.entry, ranks=_ranks_of(server.entry.url))
        else:
            server.entry = replace(server.entry, url=server.readiness.url)
            server.child.essential = False  # from here on it is restarted when it dies
            self._supervisor.note_shared_memory()
        server.ready = True
        word = "back" if server.entry.life else "ready"
        self._say(server, f"is {word} at {server.entry.url} after {time.monotonic() - server.began:.0f} s")
        self._publish()

    def _leave_out(self, silent: list[_ManagedServer]) -> None:
        """Remove given servers that did not answer."""
        urls = masked(", ".join(server.entry.url for server in silent))
        limit = f"{self._settings.startup_timeout_s:g} s"
        if len(silent) == len(self._servers):
            raise UserError(
                f"none of engine.urls answered within {limit} ({urls}): start them, or correct the addresses"
            )
        print(f"engine.urls: no answer within {limit} from {urls}: continuing without them", flush=True)
        self._servers = [server for server in self._servers if server.ready]
        self._publish()

    def _port(self, number: int) -> int:
        if self._settings.port:
            return self._settings.port + number
        taken = {urlsplit(server.entry.url).port for server in self._servers}
        return self._supervisor.port_for(self._settings.host, taken)

    def _publish(self) -> None:
        ready = [server.entry for server in self._servers if server.ready]
        self._folder.publish(ready, sum(server.coming for server in self._servers))

    def _say(self, server: _ManagedServer, what: str) -> None:
        print(masked(f"{server.entry.name} {what}"), flush=True)


def _ranks_of(url: str) -> int:
    """Tensor-parallel ranks of a given server, as the server reports. Raises RunError."""
    try:
        return int(httpx.get(f"{url}/server_info", timeout=INFO_S, trust_env=False).json()["tp_size"])
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise RunError(
            f"engine {url} does not report its tp_size on /server_info ({type(error).__name__}): is it SGLang?"
        ) from None
