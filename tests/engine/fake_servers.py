"""Small real HTTP servers with the SGLang calls that a pool needs, which can die, hang, reset and refuse."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Answer = Callable[[dict[str, Any]], Awaitable[web.Response | None]]


@dataclass
class FakeServer:
    """`answer(body)` may wait or raise; None: the normal reply."""

    version: str = "1"
    answer: Answer | None = None
    silent: bool = False  # accepts connections, answers nothing
    reports_progress: bool = False  # has the calls that report on the scheduler behind the HTTP side
    batches: int = 0  # that the scheduler has finished
    paused: bool = False
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    answered: int = 0
    reset_next: int = 0  # number of connections to break

    async def die(self) -> None:
        """Break every connection and stop listening."""
        await self.site.stop()
        for transport in list(self.transports):
            transport.abort()

    async def start(self, port: int = 0) -> None:
        app = web.Application()
        app.router.add_post("/generate", self._generate)
        app.router.add_get("/model_info", self._model_info)
        if self.reports_progress:
            app.router.add_get("/v1/loads", self._loads)
            app.router.add_get("/ready", self._ready)
            app.router.add_get("/ping", self._ping)
        self.transports: set[asyncio.Transport] = set()
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self.runner.setup()
        self.site = web.TCPSite(self.runner, "127.0.0.1", port)
        await self.site.start()
        port = self.site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        self.url = f"http://127.0.0.1:{port}"

    async def _generate(self, request: web.Request) -> web.Response:
        assert request.transport is not None
        self.transports.add(request.transport)
        body = await request.json()
        self.bodies.append(body)
        if self.reset_next > 0:
            self.reset_next -= 1
            request.transport.abort()
        if self.silent:
            await asyncio.sleep(3600)
        if self.answer is not None and (answer := await self.answer(body)) is not None:
            return answer
        self.answered += 1
        return web.json_response([reply(self.version)] * body["sampling_params"]["n"])

    async def _model_info(self, request: web.Request) -> web.Response:
        if self.silent:
            await asyncio.sleep(3600)
        return web.json_response({"weight_version": self.version})

    async def _loads(self, request: web.Request) -> web.Response:
        return web.json_response({"loads": [{"timestamp": float(self.batches)}]})

    async def _ready(self, request: web.Request) -> web.Response:
        return web.Response(status=503 if self.paused else 200)

    async def _ping(self, request: web.Request) -> web.Response:
        return web.Response()


def slowly(seconds: float) -> Answer:
    async def answer(body: dict[str, Any]) -> None:
        await asyncio.sleep(seconds)

    return answer


def reply(version: str) -> dict[str, Any]:
    return {
        "output_ids": [5, 2],
        "meta_info": {
            "finish_reason": {"type": "stop"},
            "output_token_logprobs": [[-0.1, 5, None], [-0.2, 2, None]],
            "weight_version": version,
            "cached_tokens": 1,
        },
    }


@asynccontextmanager
async def servers(*fakes: FakeServer) -> AsyncIterator[None]:
    """They listen, each at its `url`, until the block ends."""
    for fake in fakes:
        await fake.start()
    try:
        yield
    finally:
        for fake in fakes:
            await fake.runner.cleanup()
