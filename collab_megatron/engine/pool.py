"""A pool of SGLang servers as one policy engine: requests of a server that dies or hangs are repeated at another one.

`use` names the live servers and their weight version. Only a weight sync makes a server live, so none comes back by
itself. A server is lost, until `use` names it again, when

- a connection to it breaks and it does not answer a ping either (one broken connection among many is no proof),
- it has been silent for `health_timeout_s` while it owes answers,
- its HTTP side answers, but its scheduler finishes no batch for `work_timeout_s` while it owes answers and is not
  paused,
- it finishes no request at all for `request_timeout_s`,
- it serves other weights than it should: somebody restarted it.

With `updates_while_sampling` a server may serve newer weights than `use` has named: the server gets the update before
the pool hears of it. An answer that was in flight at that moment may be of the older weights.

The requests of a lost server are repeated at once; the caller does not notice. A request that a server refuses raises
RunError: another server would refuse it too.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from collab_megatron.concurrency import cancel_all
from collab_megatron.engine.client import EngineClient, EngineGone, EngineSilent, open_session
from collab_megatron.engine.keys import EngineKeys
from collab_megatron.engine.pool_usage import PoolUsage
from collab_megatron.errors import NoEngineLeft, RunError, masked
from collab_megatron.limiter import AdaptiveLimiter
from collab_megatron.types import Generation

PING_EVERY_S = 3.0
PING_DEADLINE_S = 5.0
MAX_BROKEN = 3
"""How often a request's connection may break at healthy servers; at the next break the request fails."""
FULLER_SHARE, FULLER_SEQUENCES = 1.25, 8
"""A prompt goes to its own server unless that has more than 1.25 times the sequences of the emptiest one, plus 8."""


@dataclass(eq=False)
class _PooledServer:
    """A live server and the signs of life that the pool has seen."""

    client: EngineClient
    version: int | None  # the weights that it must serve; None: any
    lost: asyncio.Future[str]  # done with the reason once it is lost
    capacity_tokens: float | None = None  # of its KV cache; None: not known yet
    sequences: int = 0  # requested and not answered yet
    last_answer: float = 0.0  # monotonic s; for a server that was idle, that of the first request
    last_progress: float = 0.0  # the same, of a finished batch or a pause
    batch_times: tuple[float, ...] = ()  # ServerLoad.batch_times at last_progress
    last_generation: float = 0.0  # monotonic s of the last generate call that it answered
    ping: asyncio.Task[None] | None = None  # after a broken connection
    first_load: asyncio.Task[None] | None = None  # reads its capacity

    @property
    def url(self) -> str:
        return self.client.url


class EnginePool:
    """A types.PolicyEngine over several servers. An async context manager, for one event loop."""

    def __init__(
        self,
        *,
        stop_token_ids: Sequence[int],
        request_timeout_s: float,
        health_timeout_s: float,
        max_concurrency: int,
        work_timeout_s: float = 120.0,
        limiter: AdaptiveLimiter | None = None,
        max_running_tokens: int | None = None,
        share: float = 1.0,
        updates_while_sampling: bool = False,
        wait_for_engines: bool = False,
        keys: EngineKeys | None = None,
    ) -> None:
        """`work_timeout_s`: more than the longest batch takes. `max_concurrency` is per server, and so is
        `max_running_tokens` (None: what its cache holds), of which this pool may use `share`.
        `limiter`: bounds the tokens in flight; the caller acquires from it, the pool sets its ceiling and reports
        servers that queue requests. `wait_for_engines`: without a live server a request waits for the next `use`."""
        self._stop_token_ids = stop_token_ids
        self._request_timeout_s = request_timeout_s
        self._health_timeout_s = health_timeout_s
        self._work_timeout_s = work_timeout_s
        self._max_concurrency = max_concurrency
        self._ping_deadline_s = min(PING_DEADLINE_S, health_timeout_s / 2)
        self._limiter, self._max_running_tokens, self._share = limiter, max_running_tokens, share
        self._updates_while_sampling, self._wait_for_engines = updates_while_sampling, wait_for_engines
        self._keys = keys
        self._has_servers = asyncio.Event()
        self._live: list[_PooledServer] = []
        self.usage = PoolUsage()
        self.lost: dict[str, str] = {}  # URL -> reason, since the last `use`

    async def __aenter__(self) -> EnginePool:
        self._session = open_session()
        self._health_checks = asyncio.create_task(self._check_health())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._live = []
        self._health_checks.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._health_checks
        await self._session.close()

    @property
    def live(self) -> tuple[str, ...]:
        """URLs of the servers in use."""
        return tuple(server.url for server in self._live)

    def use(self, urls: Sequence[str], version: int | None) -> None:
        """Replace the live servers; all serve the weights `version` (None: any) from now on.

        Clears `lost`. Requests in flight go on, also those at servers that are dropped.
        """
        staying = {server.url: server for server in self._live}
        self._live = []
        for url in dict.fromkeys(urls):
            server = staying.get(url) or self._new_server(url)
            server.version = version
            self._live.append(server)
        self.lost = {}
        self._update_ceiling()
        if self._live:
            self._has_servers.set()
        else:
            self._has_servers.clear()

    def _new_server(self, url: str) -> _PooledServer:
        client = EngineClient(
            self._session,
            url,
            stop_token_ids=self._stop_token_ids,
            timeout_s=self._request_timeout_s,
            max_concurrency=self._max_concurrency,
            keys=self._keys,
        )
        server = _PooledServer(client, None, lost=asyncio.get_running_loop().create_future())
        server.first_load = asyncio.create_task(self._check_load(server))
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
        """n continuations of `input_ids`, all from one server; requests of the same `affinity` share a server's cache.

        Waits for a permit of the server and for its answer, and repeats both elsewhere if the server is lost.
        Raises NoEngineLeft when no server is left, and RunError if the server refuses or is too slow.
        """
        broken = 0
        server = await self._choose(affinity)
        while True:
            try:
                generations = await self._request(server, input_ids, n, temperature, max_new_tokens)
                if generations is not None:
                    return generations
            except EngineSilent as error:
                if server.last_generation > time.monotonic() - self._request_timeout_s:
                    raise  # it answers other requests: slow, not hung
                self._mark_lost(server, str(error))
            except EngineGone as error:
                await self._ping_after(server, error)
                broken += not server.lost.done()
                if broken > MAX_BROKEN:
                    raise
            self.usage.retried += 1
            if server.lost.done() or broken > 1:
                server = await self._choose(affinity, avoid=server)

    async def _choose(self, affinity: str, avoid: _PooledServer | None = None) -> _PooledServer:
        """The prompt's own server among those not far fuller than the emptiest; without `affinity` the emptiest."""
        if self._wait_for_engines:
            await self._has_servers.wait()
        servers = [server for server in self._live if server is not avoid] or self._live
        if not servers:
            reasons = "; ".join(f"{url}: {reason}" for url, reason in self.lost.items())
            raise NoEngineLeft(f"no engine is left ({reasons or 'none is live yet'})")
        emptiest = min(servers, key=lambda server: server.sequences)
        if not affinity:
            return emptiest
        limit = FULLER_SHARE * emptiest.sequences + FULLER_SEQUENCES
        # rendezvous hashing: when a server leaves, only its own prompts move
        return max(
            (server for server in servers if server.sequences <= limit),
            key=lambda server: hashlib.blake2b(f"{server.url} {affinity}".encode(), digest_size=8).digest(),
        )

    async def _request(
        self, server: _PooledServer, input_ids: Sequence[int], n: int, temperature: float, max_new_tokens: int
    ) -> list[Generation] | None:
        """One request to one server; None as soon as the server is lost."""
        if not server.sequences:
            server.last_answer = server.last_progress = time.monotonic()
        server.sequences += n
        asked_version = server.version
        call = asyncio.ensure_future(
            server.client.generate(
                input_ids,
                n=n,
                temperature=temperature,
                max_new_tokens=max_new_tokens,
                # a prefix that older weights computed is never reused, even where the server's cache was not flushed
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
            await cancel_all([call])  # its own deadline may come first: asyncio logs an exception that nobody reads
        server.last_answer = server.last_progress = server.last_generation = time.monotonic()
        if not all(
            self._has_right_weights(server, version, asked_version)
            for version in {version for generation in generations for version in generation.versions_T}
        ):
            return None
        self.usage.count(server.url, len(input_ids), generations)
        return generations

    def _mark_lost(self, server: _PooledServer, reason: str) -> None:
        if server.lost.done():
            return
        server.lost.set_result(reason)
        if server in self._live:
            self._live.remove(server)
            self.lost[server.url] = reason
            if not self._live:
                self._has_servers.clear()
            print(masked(f"engine {server.url} is lost: {reason}"), flush=True)

    def _has_right_weights(self, server: _PooledServer, version: int, asked_version: int | None) -> bool:
        """Whether the server may serve `version`; if not, it is lost. `asked_version`: `server.version` at the time of
        the request. Update and `use` may have come since then."""
        if server.version is None or version == server.version:
            return True
        if self._updates_while_sampling and (asked_version is None or version >= asked_version):
            return True
        self._mark_lost(server, f"it serves weight version {version} instead of {server.version}: was it restarted?")
        return False

    async def _ping_after(self, server: _PooledServer, broke: EngineGone) -> None:
        """After a broken connection: mark the server lost unless it answers a ping, which all its requests share."""

        async def ping() -> None:
            asked_version = server.version
            try:
                version = await server.client.weight_version(timeout_s=self._ping_deadline_s)
            except RunError:
                self._mark_lost(server, str(broke))
            else:
                self._has_right_weights(server, version, asked_version)

        if server.ping is None or server.ping.done():
            server.ping = asyncio.create_task(ping())
        await asyncio.shield(server.ping)

    async def _check_health(self) -> None:
        """Ping the servers that owe an answer, until cancelled."""
        while True:
            await asyncio.sleep(min(PING_EVERY_S, self._health_timeout_s / 4, self._work_timeout_s / 4))
            await asyncio.gather(*(self._check_server(server) for server in self._live if server.sequences))

    async def _check_server(self, server: _PooledServer) -> None:
        asked_version = server.version
        try:
            version = await server.client.weight_version(timeout_s=self._ping_deadline_s)
        except (EngineGone, EngineSilent):
            silent_s = time.monotonic() - server.last_answer
            if silent_s >= self._health_timeout_s:
                self._mark_lost(server, f"it was silent for {silent_s:.0f} s")
        except RunError:
            server.last_answer = time.monotonic()  # it refuses, so it lives
        else:
            server.last_answer = time.monotonic()
            if self._has_right_weights(server, version, asked_version):
                await self._check_load(server)

    async def _check_load(self, server: _PooledServer) -> None:
        """Read the server's capacity, whether it queues requests (they should wait in the limiter) and whether it makes
        progress."""
        try:
            load = await server.client.load(timeout_s=self._ping_deadline_s)
        except RunError:
            return  # it answers pings: an older server without that call
        if load.capacity_tokens and server.capacity_tokens is None:
            server.capacity_tokens = load.capacity_tokens
            self._update_ceiling()
        if load.waiting_requests and self._limiter is not None:
            self._limiter.overloaded()
        if server.sequences:
            await self._check_progress(server, load.batch_times)

    async def _check_progress(self, server: _PooledServer, batch_times: tuple[float, ...]) -> None:
        """Mark a server lost that owes answers and finishes no batch."""
        try:
            progress = batch_times != server.batch_times or await server.client.paused(timeout_s=self._ping_deadline_s)
        except RunError:
            return  # it does not report whether it is paused
        if progress:
            server.batch_times, server.last_progress = batch_times, time.monotonic()
            return
        idle_s = time.monotonic() - server.last_progress
        if server.sequences and idle_s >= self._work_timeout_s:
            self._mark_lost(server, f"it finished no batch for {idle_s:.0f} s, {server.sequences} sequences in flight")

    def _update_ceiling(self) -> None:
        """The limiter's ceiling is this pool's share of what the live servers hold."""
        if self._limiter is None:
            return
        each = [self._max_running_tokens or server.capacity_tokens or float("inf") for server in self._live]
        if each:
            self._limiter.set_ceiling(self._share * sum(each))
