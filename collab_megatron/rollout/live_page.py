"""The live page of a driver process: `/` for a browser, `/status` as JSON, `/metrics` for Prometheus.

It listens on loopback, behind a random key of this start: a conversation is nobody else's business, also on this
machine. Address and key are in live.json next to the logs, mode 600. A browser asks for the key as a password; other
clients send it as a bearer token. It reads and changes nothing. Strangers can hold MOST_CONNECTIONS of its connections,
IDLE_S each, and so none of the file descriptors that the driver needs for its calls.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import html
import json
import os
import re
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import cast

import orjson
from aiohttp import web
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from collab_megatron.errors import UserError
from collab_megatron.files import publish_secret
from collab_megatron.log import log_of_server
from collab_megatron.wire.dropped import Dropped
from collab_megatron.wire.live_status import Status, rows_of, title_of

REFRESH_S = 3
LONGEST_TEXT = 2000  # characters of a message on the page
END_S = 2.0  # for requests in flight at the end
IDLE_S = 30.0  # for a connection without a whole request
MOST_CONNECTIONS = 64


class LivePage:
    """Serves what `status` returns at each request."""

    def __init__(self, status: Callable[[], Status]) -> None:
        self._status, self._key = status, secrets.token_urlsafe(24)
        self._runner: web.AppRunner | None = None
        self._listening: asyncio.Server | None = None
        self._accepted = 0  # connections that `_runner.server` does not list yet
        self.refused = Dropped()

    async def start(self, port: int, file: Path) -> str:
        """Listen on 127.0.0.1 at `port` (0: a free one) and write address and key to `file`; returns the address.
        Raises UserError for a port that is in use."""
        app = web.Application(middlewares=[self._only_with_the_key])
        app.add_routes([web.get("/", self._page), web.get("/status", self._json), web.get("/metrics", self._metrics)])
        self._runner = web.AppRunner(
            app,
            access_log=None,
            logger=log_of_server(self._count_malformed),
            shutdown_timeout=END_S,
            keepalive_timeout=IDLE_S,
            lingering_time=0,  # no request has a body that should be waited for
        )
        await self._runner.setup()
        try:
            self._listening = await asyncio.get_running_loop().create_server(self._connection, "127.0.0.1", port)
        except OSError as error:
            await self.close()
            raise UserError(f"driver.live_port={port} cannot be used: {os.strerror(error.errno or 0)}") from None
        url = f"http://127.0.0.1:{self._listening.sockets[0].getsockname()[1]}"
        publish_secret(file, json.dumps({"url": url, "key": self._key}) + "\n")
        return url

    async def close(self) -> None:
        """Stop listening. Waits at most END_S for requests in flight."""
        if self._listening is not None:
            self._listening.close()
        if self._runner is not None:
            await self._runner.cleanup()

    def _count_malformed(self) -> None:
        self.refused["malformed"] += 1

    def _connection(self) -> asyncio.Protocol:
        """Of a new connection."""
        assert self._runner is not None
        server = self._runner.server
        assert server is not None
        if len(server.connections) + self._accepted >= MOST_CONNECTIONS:
            self.refused["too many connections"] += 1
            return _Closed()
        # asyncio accepts up to 100 connections before the first of them is made
        self._accepted += 1
        asyncio.get_running_loop().call_soon(self._made)
        return server()

    def _made(self) -> None:
        """Runs directly before `connection_made`, which asyncio schedules after it has called `_connection`."""
        self._accepted -= 1

    @web.middleware
    async def _only_with_the_key(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if not hmac.compare_digest(key_of(request.headers.get("Authorization", "")), self._key.encode()):
            self.refused["without the key"] += 1
            return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="live page"'})
        return await handler(request)

    async def _page(self, _: web.Request) -> web.Response:
        return web.Response(
            text=page(self._status()),
            content_type="text/html",
            headers={
                "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{STYLE_SUM}'",
                "Cache-Control": "no-store",
            },
        )

    async def _json(self, _: web.Request) -> web.Response:
        status = {**asdict(self._status()), "refused": self.refused}
        body = orjson.dumps(status, option=orjson.OPT_SERIALIZE_NUMPY)
        return web.Response(body=body, content_type="application/json", headers={"Cache-Control": "no-store"})

    async def _metrics(self, _: web.Request) -> web.Response:
        body = await asyncio.to_thread(prometheus, self._status(), self.refused.total())
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})


def key_of(header: str) -> bytes:
    """The key of an Authorization header: a bearer token, or the password of Basic; empty without one."""
    scheme, _, value = header.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode(errors="surrogateescape")
    if scheme.lower() != "basic":
        return b""
    try:
        return base64.b64decode(value, validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return b""


class _Closed(asyncio.Protocol):
    """Of a connection beyond MOST_CONNECTIONS."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).abort()


def prometheus(status: Status, refused: int = 0) -> bytes:
    """All numbers as gauges: collab_step, ..., and collab_reward_mr_mean for the figure reward/mr_mean."""
    numbers: dict[str, float] = {
        "step": status.step,
        "steps": status.steps,
        "phase_seconds": status.phase_s,
        "trees_running": status.trees_running,
        "turns_waiting": status.turns_waiting,
        "engines_live": status.engines_live,
        "engines_lost": len(status.engines_lost),
        "usd_to_date": status.usd,
        "calls_to_date": status.calls,
        "live_page_refused": refused,
        **{f"calls_in_flight_{role}": count for role, count in status.calls_in_flight.items()},
    }
    if status.eta_s is not None:
        numbers["eta_seconds"] = status.eta_s
    registry = CollectorRegistry()
    for name, value in {gauge_name(name): value for name, value in {**status.figures, **numbers}.items()}.items():
        Gauge(name, name.removeprefix("collab_").replace("_", " "), registry=registry).set(value)
    return bytes(generate_latest(registry))


def gauge_name(name: str) -> str:
    """reward/mr_mean -> collab_reward_mr_mean. Two names that differ in a mark only become one, with the last value."""
    return "collab_" + re.sub(r"\W", "_", name, flags=re.ASCII)


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
table { border-collapse: collapse; }
td { padding: .1rem 1.5rem .1rem 0; } td + td { font-variant-numeric: tabular-nums; }
progress { width: 100%; } .user { color: #7a5500; } .lost { color: #b00020; }
pre { white-space: pre-wrap; margin: .3rem 0; }
@media (prefers-color-scheme: dark) { body { background: #16181d; color: #ddd; } .user { color: #e0b060; } }
"""
STYLE_SUM = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()


def page(status: Status) -> str:
    """As HTML without scripts; it loads itself again. Everything that a model wrote is escaped."""
    table = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in rows_of(status).items()
    )
    lost = "".join(f'<p class="lost">{html.escape(f"{url}: {why}")}</p>' for url, why in status.engines_lost.items())
    chat = "".join(
        f'<pre class="{"user" if role == "user" else "policy"}">{html.escape(f"{role}: {text[:LONGEST_TEXT]}")}</pre>'
        for role, text in status.chat
    )
    title = html.escape(title_of(status))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="{REFRESH_S}">'
        f"<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>"
        f'<progress max="{status.steps}" value="{status.step}"></progress><table>{table}</table>{lost}'
        f"<h2>The best reply of the last batch, and a future</h2>{chat or '<p>no batch yet</p>'}</body></html>"
    )
