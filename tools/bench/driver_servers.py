"""Both stand-ins of tools/bench/driver.py in one process: simulator and judge endpoint, and an SGLang engine.

    python tools/bench/driver_servers.py --ready-file FILE

It binds a free port on loopback and writes http://HOST:PORT to FILE.

    POST /v1/chat/completions   driver_api.py
    POST /generate              driver_engine.py; GET /model_info tells its weight version
    POST /settings              begins a new trace with these `Settings`
    POST /version               the engine's weights from now on
    GET  /trace                 what was asked since /settings, and what it cost this process

Bare HTTP/1.1 on uvloop, since the cores belong to the driver that is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import orjson
import uvloop

from collab_megatron.errors import run_cli
from collab_megatron.files import publish_text
from collab_megatron.signals import die_with_parent
from tools.bench.driver_api import FAILURE, Call, SimulatorEndpoint
from tools.bench.driver_engine import EngineStandIn

BACKLOG = 4096
HEAD_END = b"\r\n\r\n"


@dataclass(frozen=True)
class Settings:
    """One measurement's load."""

    seed: int = 1
    median_s: float = 0.0  # of the API latencies; 0: none
    sigma: float = 0.8  # of their logarithm
    fail_share: float = 0.0  # of the calls, which fail once with status 500, at once
    capacity: float = 1e9  # engine tokens/s in all
    sequence_rate: float = 1e9  # engine tokens/s of one sequence
    reply_tokens: int = 41  # with the end of turn
    version: int = 0  # of the weights


class StandIns:
    """The state behind all connections."""

    def __init__(self) -> None:
        self.begin(Settings())

    def begin(self, settings: Settings) -> None:
        self.api = SimulatorEndpoint(
            seed=settings.seed, median_s=settings.median_s, sigma=settings.sigma, fail_share=settings.fail_share
        )
        self.engine = EngineStandIn(
            capacity=settings.capacity, sequence_rate=settings.sequence_rate, reply_tokens=settings.reply_tokens
        )
        self.engine.version = settings.version
        self.calls: list[tuple[Call, float]] = []  # with the time of arrival
        self.requests = 0
        self.in_flight = 0
        self.peak_in_flight = 0
        self.cpu_s = time.process_time()

    def trace(self) -> dict[str, Any]:
        return {
            "calls": [{**asdict(call), "arrived_s": arrived} for call, arrived in self.calls],
            "engine": asdict(self.engine.usage),
            "failures": self.api.failures,
            "peak_in_flight": self.peak_in_flight,
            "requests": self.requests,
            "cpu_s": time.process_time() - self.cpu_s,
        }


class Connection(asyncio.Protocol):
    """One keep-alive connection; a client sends its next request after the answer to the last."""

    def __init__(self, state: StandIns) -> None:
        self._state = state
        self._buffer = b""
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are none by class

    def data_received(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data
        while (head_end := self._buffer.find(HEAD_END)) >= 0:
            head = self._buffer[:head_end]
            start = head_end + len(HEAD_END)
            end = start + _content_length(head)
            if len(self._buffer) < end:
                return
            body, self._buffer = self._buffer[start:end], self._buffer[end:]
            self._serve(head[: head.index(b"\r\n")].split(b" ", 2)[1], body)

    def _serve(self, path: bytes, body: bytes) -> None:
        state = self._state
        if path == b"/v1/chat/completions":
            state.requests += 1
            self._complete(orjson.loads(body))
        elif path == b"/generate":
            state.requests += 1
            state.engine.generate(orjson.loads(body), partial(self._answer, b"200 OK"))
        elif path == b"/model_info":
            self._answer(b"200 OK", b'{"weight_version":"%d"}' % state.engine.version)
        elif path == b"/settings":
            state.begin(Settings(**orjson.loads(body)))
            self._answer(b"200 OK", b"{}")
        elif path == b"/version":
            state.engine.version = int(orjson.loads(body)["version"])
            self._answer(b"200 OK", b"{}")
        elif path == b"/trace":
            self._answer(b"200 OK", orjson.dumps(state.trace()))
        else:
            self._answer(b"404 Not Found", b"{}")

    def _complete(self, body: dict[str, Any]) -> None:
        state = self._state
        planned = state.api.plan(body)
        if planned.reply is None:
            self._answer(b"500 Internal Server Error", FAILURE)
            return
        loop = asyncio.get_running_loop()
        state.calls.append((planned.call, loop.time()))
        state.in_flight += 1
        state.peak_in_flight = max(state.peak_in_flight, state.in_flight)
        if planned.call.latency_s:
            loop.call_later(planned.call.latency_s, self._completed, state, planned.reply)
        else:
            self._completed(state, planned.reply)

    def _completed(self, state: StandIns, reply: bytes) -> None:
        state.in_flight -= 1
        self._answer(b"200 OK", reply)

    def _answer(self, status: bytes, body: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(
                b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
                % (status, len(body), body)
            )


def _content_length(head: bytes) -> int:
    lower = head.lower()
    at = lower.find(b"\r\ncontent-length:")
    if at < 0:
        return 0
    line_end = lower.find(b"\r\n", at + 2)
    return int(lower[at + len(b"\r\ncontent-length:") : line_end if line_end >= 0 else None])


async def serve(announce: Callable[[str], None]) -> None:
    """Answer until cancelled."""
    state = StandIns()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(state), "127.0.0.1", 0, backlog=BACKLOG)
    announce(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ready-file", type=Path, required=True)
    args = parser.parse_args()
    die_with_parent()
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(serve(partial(publish_text, args.ready_file)))


if __name__ == "__main__":
    run_cli(main)
