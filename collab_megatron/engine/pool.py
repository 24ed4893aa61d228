"""Any number of SGLang servers as one policy engine; one that dies or hangs is given up and its requests asked anew.

Which servers are live, and under which weight version, is told by `use`: nothing but a weight sync makes a server live,
so none comes back by itself. A server is lost for good, until `use` names it again, when

- a connection to it breaks and it does not answer a ping either (one broken connection of many condemns nobody),
- it is silent for `health_timeout_s` while it owes answers,
- its HTTP side answers, but its scheduler finishes no batch for `work_timeout_s` while it owes answers and was not told
  to pause,
- it ends no request at all for `request_timeout_s`,
- it serves other weights than it should: somebody restarted it.

Where sampling goes on while the trainer updates (`ahead`), a server may serve newer weights than were named last: the
update reaches it before the news of it reaches us. An answer that was under way then may be of the older ones.

Every request that it had is given up at once and sampled anew by another server; the caller does not notice. A request
that a server refuses is the request's fault: a RunError, as ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from collab_megatron.engine.client import EngineClient, EngineGone, EngineSilent, open_session
from collab_megatron.engine.keys import EngineKeys
from collab_megatron.engine.pool_usage import PoolUsage
from collab_megatron.errors import NoEngineLeft, RunError, masked
from collab_megatron.limiter import Slots
from collab_megatron.types import Generation

PING_EVERY_S = 3.0
PING_DEADLINE_S = 5.0
MAX_BROKEN = 3
"""So often may a request's connection break at servers that are well; once more, and it is the request that fails."""
FULLER_SHARE, FULLER_SEQUENCES = 1.25, 8
"""A prompt goes to its own server unless that has over 1.25 times the sequences of the emptiest one, plus 8."""


@dataclass(eq=False)
class _Server:
    """One server between two calls of `use`."""

    client: EngineClient
    version: int | None  # the weights that it must serve; None: whatever it has
    lost: asyncio.Future[str]  # the reason, once it is lost
    capacity: float | None = None  # tokens that its cache holds, once it has said so
    sequences: int = 0  # that it was asked for and has not answered yet
    heard: float = 0.0  # monotonic s of its last sign of life; of the request, where it was idle before
    worked: float = 0.0  # the same of its last sign of work: a batch finished, or told to pause
    stamps: tuple[float, ...] = ()  # of the batch that was last seen
    finished: float = 0.0  # monotonic s of the last generate call that it answered
    check: asyncio.Task[None] | None = None  # the ping after a broken connection
    first_look: asyncio.Task[None] | None = None  # at what it holds

    @property
    def url(self) -> str:
        return self.client.url


class EnginePool:
    """A types.PolicyEngine over several servers. Use as an async context manager; for one asyncio loop."""

    def __init__(
        self,
        *,
        stop_token_ids: Sequence[int],
        request_timeout_s: float,
        health_timeout_s: float,
        max_concurrency: int,
        work_timeout_s: float = 120.0,
        slots: Slots | None = None,
        max_running_tokens: int | None = None,
        share: float = 1.0,
        ahead: bool = False,
        wait_for_engines: bool = False,
        keys: EngineKeys | None = None,
    ) -> None:
        """`work_timeout_s`: longer than the longest batch takes.
        `max_concurrency` is per server, and so is `max_running_tokens` (None: what its cache holds); `share` of the
        latter is ours. The pool keeps the ceiling of `slots`, which others take, and cuts it where a server queues.
        With `wait_for_engines` a request waits for the next `use` where no server is left."""
        self._stop_token_ids = stop_token_ids
        self._request_timeout_s = request_timeout_s
        self._health_timeout_s = health_timeout_s
        self._work_timeout_s = work_timeout_s
        self._max_concurrency = max_concurrency
        self._ping_deadline_s = min(PING_DEADLINE_S, health_timeout_s / 2)
        self._slots, self._max_running_tokens, self._share = slots, max_running_tokens, share
        self._ahead, self._wait_for_engines = ahead, wait_for_engines
        self._keys = keys
        self._came = asyncio.Event()  # there are live servers
        self._live: list[_Server] = []
        self.usage = PoolUsage()
        self.lost: dict[str, str] = {}  # URL -> reason, since the last `use`

    async def __aenter__(self) -> EnginePool:
        self._session = open_session()
        self._watching = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._live = []
        self._watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._watching
        await self._session.close()

    @property
    def live(self) -> tuple[str, ...]:
        """URLs of the servers in use."""
        return tuple(server.url for server in self._live)

    def use(self, urls: Sequence[str], version: int | None) -> None:
        """From now on these servers and no others; they serve the weights `version` (None: whatever they have).

        What was lost before is forgotten. Requests go on at servers that stay; at others they may end there.
        """
        staying = {server.url: server for server in self._live}
        self._live = []
        for url in dict.fromkeys(urls):
            server = staying.get(url) or self._new_server(url)
            server.version = version
            self._live.append(server)
        self.lost = {}
        self._note_capacity()
        if self._live:
            self._came.set()
        else:
            self._came.clear()

    def _new_server(self, url: str) -> _Server:
        client = EngineClient(
            self._session,
            url,
            stop_token_ids=self._stop_token_ids,
            timeout_s=self._request_timeout_s,
            max_concurrency=self._max_concurrency,
            keys=self._keys,
        )
        server = _Server(client, None, lost=asyncio.get_running_loop().create_future())
        server.first_look = asyncio.create_task(self._look_at_load(server))
        return server

    async def generate(
        self,
        input_ids: Sequence[int],
        *,
        n: int,
        temperature: float,
        max_new_tokens: int,
        affinity: str = "",
        name: str = "",
    ) -> list[Generation]:
        """n continuations of `input_ids`, all of one server; requests of the same `affinity` share a server's cache.

        Waits for a slot and for the server, over again with another one if it is lost.
        Raises NoEngineLeft when there is no other one, and RunError if the server refuses or is too slow.
        """
        broken = 0
        server = await self._choose(affinity)
        while True:
            try:
                generations = await self._ask(server, input_ids, n, temperature, max_new_tokens)
                if generations is not None:
                    return generations
            except EngineSilent as error:
                if server.finished > time.monotonic() - self._request_timeout_s:
                    raise  # it does answer others: slow, not hung
                self._lose(server, str(error))
            except EngineGone as error:
                await self._check(server, error)
                broken += not server.lost.done()
                if broken > MAX_BROKEN:
                    raise
            self.usage.retried += 1
            if server.lost.done() or broken > 1:
                server = await self._choose(affinity, avoid=server)

    async def _choose(self, affinity: str, avoid: _Server | None = None) -> _Server:
        """The server of this prompt among those that are not far fuller than the emptiest; else the emptiest."""
        if self._wait_for_engines:
            await self._came.wait()
        servers = [server for server in self._live if server is not avoid] or self._live
        if not servers:
            reasons = "; ".join(f"{url}: {reason}" for url, reason in self.lost.items())
            raise NoEngineLeft(f"no engine is left ({reasons or 'none is live yet'})")
        emptiest = min(servers, key=lambda server: server.sequences)
        if not affinity:
            return emptiest
        limit = FULLER_SHARE * emptiest.sequences + FULLER_SEQUENCES
        # rendezvous hashing: when a server goes, only its own prompts move
        return max(
            (server for server in servers if server.sequences <= limit),
            key=lambda server: hashlib.blake2b(f"{server.url} {affinity}".encode(), digest_size=8).digest(),
        )

    async def _ask(
        self, server: _Server, input_ids: Sequence[int], n: int, temperature: float, max_new_tokens: int
    ) -> list[Generation] | None:
        """One request to one server; None as soon as the server is lost."""
        if not server.sequences:
            server.heard = server.worked = time.monotonic()
        server.sequences += n
        asked_of = server.version
        call = asyncio.ensure_future(
            server.client.generate(
                input_ids,
                n=n,
                temperature=temperature,
                max_new_tokens=max_new_tokens,
                # prefixes that older weights computed are never reused, whether the server's cache was emptied or not
                cache_key=None if server.version is None else str(server.version),
            )
        )
        try:
            either: set[asyncio.Future[Any]] = {call, server.lost}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not call.done():
                return None
            generations = call.result()
        finally:
            server.sequences -= n
            call.cancel()
        server.heard = server.worked = server.finished = time.monotonic()
        if not all(
            self._serves(server, version, asked_of)
            for version in {version for generation in generations for version in generation.versions_T}
        ):
            return None
        self.usage.count(server.url, len(input_ids), generations)
        return generations

    def _lose(self, server: _Server, reason: str) -> None:
        if server.lost.done():
            return
        server.lost.set_result(reason)
        if server in self._live:
            self._live.remove(server)
            self.lost[server.url] = reason
            if not self._live:
                self._came.clear()
            print(masked(f"engine {server.url} is lost: {reason}"), flush=True)

    def _serves(self, server: _Server, version: int, asked_of: int | None) -> bool:
        """Whether that is the version the server must serve; if not, it is lost. `asked_of`: the one that was named
        last when it was asked. An update, and the news of it, may have come while it answered."""
        if server.version is None or version == server.version:
            return True
        if self._ahead and (asked_of is None or version >= asked_of):
            return True
        self._lose(server, f"it serves weight version {version} instead of {server.version}: was it restarted?")
        return False

    async def _check(self, server: _Server, broke: EngineGone) -> None:
        """After a broken connection: lose the server unless it answers a ping. All its broken requests share one."""

        async def ping() -> None:
            asked_of = server.version
            try:
                version = await server.client.weight_version(timeout_s=self._ping_deadline_s)
            except RunError:
                self._lose(server, str(broke))
            else:
                self._serves(server, version, asked_of)

        if server.check is None or server.check.done():
            server.check = asyncio.create_task(ping())
        await asyncio.shield(server.check)

    async def _watch(self) -> None:
        """Ping the servers that owe an answer, until cancelled."""
        while True:
            await asyncio.sleep(min(PING_EVERY_S, self._health_timeout_s / 4, self._work_timeout_s / 4))
            await asyncio.gather(*(self._watch_one(server) for server in self._live if server.sequences))

    async def _watch_one(self, server: _Server) -> None:
        asked_of = server.version
        try:
            version = await server.client.weight_version(timeout_s=self._ping_deadline_s)
        except (EngineGone, EngineSilent):
            silent_s = time.monotonic() - server.heard
            if silent_s >= self._health_timeout_s:
                self._lose(server, f"it was silent for {silent_s:.0f} s")
        except RunError:
            server.heard = time.monotonic()  # it refuses, so it lives
        else:
            server.heard = time.monotonic()
            if self._serves(server, version, asked_of):
                await self._look_at_load(server)

    async def _look_at_load(self, server: _Server) -> None:
        """What its cache holds, whether requests wait in its own queue, where ours would be better placed, and whether
        it works at all."""
        try:
            load = await server.client.load(timeout_s=self._ping_deadline_s)
        except RunError:
            return  # the ping before was answered: an older server without that call
        if load.capacity_tokens and server.capacity is None:
            server.capacity = load.capacity_tokens
            self._note_capacity()
        if load.waiting_requests and self._slots is not None:
            self._slots.overloaded()
        if server.sequences:
            await self._look_at_work(server, load.stamps)

    async def _look_at_work(self, server: _Server, stamps: tuple[float, ...]) -> None:
        """Lose a server that owes answers and stands still."""
        try:
            works = stamps != server.stamps or await server.client.paused(timeout_s=self._ping_deadline_s)
        except RunError:
            return  # it does not tell whether it is paused
        if works:
            server.stamps, server.worked = stamps, time.monotonic()
            return
        idle_s = time.monotonic() - server.worked
        if server.sequences and idle_s >= self._work_timeout_s:
            self._lose(server, f"it finished no batch for {idle_s:.0f} s, {server.sequences} sequences under way")

    def _note_capacity(self) -> None:
        """The ceiling of the slots: our share of what the live servers hold."""
        if self._slots is None:
            return
        each = [self._max_running_tokens or server.capacity or float("inf") for server in self._live]
        if each:
            self._slots.set_ceiling(self._share * sum(each))
