"""An OpenAI-compatible endpoint that misbehaves at a given rate and counts what it did, in its own thread.

with MisbehavingEndpoint(lambda body: "hello", faults={"500": 0.1, "hang": 0.05}, seed=1) as endpoint:
    ...  # endpoint.url, endpoint.counts["500"], endpoint.counts_of["model-name"]["good"]
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import web

START_S = 10.0
HANG_S = 60.0  # longer than any client waits here
FAULTY = "FAULTY"  # in the text of every answer that must not be used
HUGE_CHARS = 5_000_000

COUNTER_OF = {  # what it does -> the field of RoleUsage that must count it
    "429": "rate_limited",
    "429_retry_after": "rate_limited",
    "500": "server_errors",
    "503": "server_errors",
    "slow": "timeouts",
    "hang": "timeouts",
    "reset": "connection_errors",
    "down": "connection_errors",
    "half_json": "bad_bodies",
    "html": "bad_bodies",
    "empty": "empty",
    "wrong_role": "wrong_role",
    "huge": "too_long",
}
ALL_FAULTS = tuple(kind for kind in COUNTER_OF if kind != "down")


def faults_at(share: float) -> dict[str, float]:
    """Every kind of fault equally often, `share` of the calls together."""
    return {kind: share / len(ALL_FAULTS) for kind in ALL_FAULTS}


class MisbehavingEndpoint:
    """`answer` gives the text of a good reply; a model's name is what stands behind the last slash."""

    def __init__(
        self,
        answer: Callable[[dict[str, Any]], str],
        *,
        faults: Mapping[str, float] | None = None,
        seed: int = 0,
        slow_s: float = HANG_S,
        retry_after_s: float = 0.3,
        delay_s: float = 0.0,
    ) -> None:
        self.faults = dict(faults or {})  # kind -> share of the calls; may be changed at any time
        self.delay_s = delay_s
        self.down_until = float("-inf")  # time.monotonic(); every connection is cut before
        self.counts: Counter[str] = Counter()  # "good" or a kind of fault, by requests
        self.counts_of: dict[str, Counter[str]] = defaultdict(Counter)  # model -> the same
        self.requests: list[dict[str, Any]] = []  # bodies, in order of arrival
        self.arrived_at: list[float] = []
        self.open_connections: set[Any] = set()  # transports
        self.url = ""
        self._answer = answer
        self._slow_s = slow_s
        self._retry_after_s = retry_after_s
        self._chance = random.Random(seed)
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> MisbehavingEndpoint:
        self._thread.start()
        assert self._ready.wait(START_S)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._loop is not None
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(START_S)

    def expected(self) -> dict[str, int]:
        """What the counters of RoleUsage must show."""
        fields = dict.fromkeys(COUNTER_OF.values(), 0)
        for kind, count in self.counts.items():
            if kind != "good":
                fields[COUNTER_OF[kind]] += count
        return fields

    def live_connections(self) -> int:
        return sum(not transport.is_closing() for transport in self.open_connections)

    async def _serve(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._complete)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.arrived_at.append(time.monotonic())
        self.open_connections.add(request.transport)
        kind = "down" if time.monotonic() < self.down_until else self._draw()
        self.counts[kind] += 1
        self.counts_of[body["model"].rpartition("/")[2]][kind] += 1
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        return await self._act(kind, request, body)

    def _draw(self) -> str:
        at = self._chance.random()
        for kind, share in self.faults.items():
            if at < share:
                return kind
            at -= share
        return "good"

    async def _act(self, kind: str, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if kind in ("429", "429_retry_after", "500", "503"):
            headers = {"Retry-After": str(self._retry_after_s)} if kind == "429_retry_after" else {}
            error = {"error": {"message": FAULTY, "type": "x", "code": "x"}}
            return web.json_response(error, status=int(kind[:3]), headers=headers)
        if kind in ("hang", "slow"):
            await asyncio.sleep(HANG_S if kind == "hang" else self._slow_s)
            return web.json_response(completion(body, FAULTY))
        if kind in ("reset", "down"):
            if request.transport is not None:
                request.transport.abort()
            return web.Response()
        if kind == "html":
            return web.Response(text=f"<html><body>{FAULTY}</body></html>", content_type="text/html")
        if kind == "half_json":
            whole = json.dumps(completion(body, FAULTY))
            return web.Response(text=whole[: len(whole) // 2], content_type="application/json")
        if kind == "empty":
            return web.json_response(completion(body, ""))
        if kind == "wrong_role":
            return web.json_response(completion(body, FAULTY, role="user"))
        if kind == "huge":
            return web.json_response(completion(body, FAULTY * (HUGE_CHARS // len(FAULTY))))
        return web.json_response(completion(body, self._answer(body)))


def completion(body: Mapping[str, Any], text: str, role: str = "assistant") -> dict[str, Any]:
    """A chat completion in OpenAI's form."""
    return {
        "id": "c",
        "object": "chat.completion",
        "created": 1,
        "model": body["model"],
        "system_fingerprint": "fp-1",
        "choices": [
            {"index": index, "finish_reason": "stop", "message": {"role": role, "content": text}}
            for index in range(body.get("n") or 1)
        ],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }
