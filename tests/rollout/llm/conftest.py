"""A real OpenAI-compatible endpoint on loopback that misbehaves on request."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

START_S = 10.0


@dataclass
class Endpoint:
    """`script`: what the next requests get, in order; an empty script answers well."""

    url: str = ""
    script: list[Any] = field(default_factory=list)  # (status, headers) | "hang" | text of the reply
    requests: list[dict[str, Any]] = field(default_factory=list)  # bodies, with the authorization header
    honour_n: bool = True
    delay_s: float = 0.0
    in_flight: int = 0
    most_in_flight: int = 0

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append({**body, "authorization": request.headers.get("Authorization")})
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            act = self.script.pop(0) if self.script else '{"thought": "t", "response": "hello"}'
            if act == "hang":
                await asyncio.sleep(30)
            await asyncio.sleep(self.delay_s)
            if isinstance(act, tuple):
                status, headers, *message = act
                error = {"error": {"message": message[0] if message else "no", "type": "x", "code": "x"}}
                return web.json_response(error, status=status, headers=headers)
            return web.Response(body=json.dumps(self._completion(body, act)), content_type="application/json")
        finally:
            self.in_flight -= 1

    def _completion(self, body: dict[str, Any], text: str) -> dict[str, Any]:
        count = (body.get("n") or 1) if self.honour_n else 1
        return {
            "id": "c",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [
                {"index": i, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
                for i in range(count)
            ],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
        }


def _serve(endpoint: Endpoint, ready: threading.Event, hand_over: Callable[..., None]) -> None:
    async def main() -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", endpoint.answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        endpoint.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        stop = asyncio.Event()
        hand_over(asyncio.get_running_loop(), stop)
        ready.set()
        await stop.wait()
        await runner.cleanup()

    asyncio.run(main())


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made, ready, ends = Endpoint(), threading.Event(), []
    thread = threading.Thread(target=_serve, args=(made, ready, lambda *pair: ends.append(pair)), daemon=True)
    thread.start()
    assert ready.wait(START_S)
    yield made
    loop, stop = ends[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join(START_S)
