"""The stand-in servers of tools/bench/driver.py in one process: the LLM of user and judge, and an SGLang engine.

    python -m tools.bench.driver_servers --ready-file FILE

Binds a free port on loopback and writes http://HOST:PORT to FILE.

    POST /v1/chat/completions   the user simulator's and the judge's LLM
    POST /generate              the engine; GET /model_info reports its weight version
    POST /settings              starts a new trace with these `Settings`
    POST /version               sets the engine's weight version
    GET  /trace                 all calls since /settings, and the CPU time they cost this process

LLM endpoint: OpenAI-compatible, lognormal latencies. A call's name comes from its messages and from the number of
different seeds that came with the same messages before it. So the driver and the recipe, whatever seeds they draw, make
the same calls with the same latencies. A user's text carries the call's name as twelve number words, and later calls of
the conversation show it in their chat, which links calls to chains.

Engine: a fixed service rate shared by all sequences, replies of a fixed length. Each sequence gets
`min(sequence_rate, capacity / sequences)` tokens/s, so the work is known: tokens of all replies / capacity. All
sequences are equally long and fast, so they end in the order of their arrival, and one count of the tokens that each
has got (`_served`) gives the time.

Bare HTTP/1.1 on uvloop: the cores belong to the driver that is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import math
import re
import time
from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any, cast

import orjson
import uvloop

from collab_megatron.errors import run_cli
from collab_megatron.files import publish_text
from collab_megatron.signals import die_with_parent

# sixteen words that the demo tokenizer knows, so that two conversations differ in their token ids too
WORDS = ("2", "3", "4", "5", "6", "7", "8", "9", "10", "12", "15", "18", "20", "24", "30", "36")
NAME_WORDS = 12
SAYS = "it is "
NAME = re.compile(rf"(?:(?:{'|'.join(WORDS)})\b ?){{{NAME_WORDS}}}(?<! )")
FAILURE = b'{"error":{"message":"the stand-in fails once","type":"server_error","code":500}}'

END_ID = 2  # the demo tokenizer's end of turn
FIRST_WORD, NUM_WORDS = 70, 108  # ids of the demo tokenizer that are plain words, without digits
LOGPROB_ITEMS = tuple(b"[-0.5,%d,null]" % token for token in range(FIRST_WORD + NUM_WORDS))
END_BYTES, END_ITEM = b"%d" % END_ID, b"[-0.5,%d,null]" % END_ID

Answer = Callable[[bytes], None]

BACKLOG = 4096
HEAD_END = b"\r\n\r\n"


@dataclass(frozen=True)
class Call:
    """One answered call, as it stands in the trace."""

    role: str  # user | judge
    name: str  # unique in a trace
    parent: str  # name of the conversation's user call before it; "" for its first
    latency_s: float


@dataclass(frozen=True)
class Planned:
    """What happens to a request: a failure at once, or `reply` after the call's latency."""

    call: Call
    reply: bytes | None  # None: fails


class SimulatorEndpoint:
    """Plans the answers to chat completions. Keeps no text, only names."""

    def __init__(self, *, seed: int, median_s: float, sigma: float, fail_share: float) -> None:
        self._seed = str(seed).encode()
        self._median_s = median_s
        self._sigma = sigma
        self._fail_share = fail_share
        self._normal = NormalDist()
        self._seen: dict[bytes, dict[object, int]] = {}  # messages -> seed -> how many seeds came before
        self._failed: set[bytes] = set()
        self.failures = 0

    def plan(self, body: Mapping[str, Any]) -> Planned:
        """Raises KeyError for a body that is no chat completion."""
        role = str(body["model"]).rpartition("/")[2]
        text = body["messages"][-1]["content"]
        content = hashlib.blake2b(f"{role}\n{text}".encode(), digest_size=16).digest()
        seeds = self._seen.setdefault(content, {})
        number = seeds.setdefault(body.get("seed"), len(seeds))
        key = hashlib.blake2b(content + b"%d" % number, digest_size=24, salt=self._seed[:16]).digest()
        call = Call(role, spell(key), last_name(text), self._latency_s(key))
        if self._fail_share and _share(key[8:16]) < self._fail_share and key not in self._failed:
            self._failed.add(key)
            self.failures += 1
            return Planned(call, None)
        content_text = user_text(call.name) if role == "user" else marks_text(key)
        return Planned(call, completion(role, content_text))

    def _latency_s(self, key: bytes) -> float:
        if not self._median_s:
            return 0.0
        return self._median_s * math.exp(self._sigma * self._normal.inv_cdf(_share(key[16:24])))


def _share(eight_bytes: bytes) -> float:
    """Uniform in (0, 1)."""
    return ((int.from_bytes(eight_bytes, "big") >> 12) + 0.5) / 2**52


def last_name(text: str) -> str:
    """The name that the last user turn in a chat carries; "" where there is none."""
    start = text.rfind(SAYS)
    found = NAME.match(text, start + len(SAYS)) if start >= 0 else None
    return found.group() if found else ""


def spell(key: bytes) -> str:
    """A call's name: number words."""
    digits = key[: NAME_WORDS // 2].hex()
    return " ".join(WORDS[int(digit, 16)] for digit in digits)


def user_text(name: str) -> str:
    """The simulated user's reply. It never ends the chat, so each chain has its full length."""
    return json.dumps({"thought": "tell the next detail and keep back the rest", "response": f"{SAYS}{name}"})


def marks_text(key: bytes) -> str:
    """A judge's marks; they differ, so that groups have spread."""
    first, second, third = (byte / 255 for byte in key[:3])
    marks = {"understanding": round(first, 2), "clarification": round(second, 2), "suggestion": round(third, 2)}
    return json.dumps({"thought": "one detail was missing and was asked for", **marks})


def completion(model: str, text: str) -> bytes:
    """An OpenAI chat completion."""
    return (
        b'{"id":"c","object":"chat.completion","created":1,"model":"%b","choices":[{"index":0,"finish_reason":"stop",'
        b'"message":{"role":"assistant","content":%b}}],'
        b'"usage":{"prompt_tokens":400,"completion_tokens":30,"total_tokens":430}}'
        % (model.encode(), json.dumps(text).encode())
    )


@dataclass
class EngineUsage:
    """What was asked for."""

    requests: int = 0
    sequences: int = 0
    tokens: int = 0


class EngineStandIn:
    """Answers the bodies of SGLang's /generate. For one asyncio loop."""

    def __init__(self, *, capacity: float, sequence_rate: float, reply_tokens: int) -> None:
        """Tokens/s in all, tokens/s of one sequence at most, and tokens of every reply, its end included."""
        self._capacity = capacity
        self._sequence_rate = sequence_rate
        self._reply_tokens = reply_tokens
        self._running: deque[tuple[float, int, bytes, Answer]] = deque()  # (ends at this much served, n, body, answer)
        self._sequences = 0
        self._served = 0.0  # tokens that a sequence would have that was there all the time
        self._since = 0.0  # loop time at which that was so
        self._timer: asyncio.TimerHandle | None = None
        self.version = 0
        self.usage = EngineUsage()

    def generate(self, body: Mapping[str, Any], answer: Answer) -> None:
        """`answer` is called with the reply's JSON when its last token is there."""
        n = int(body["sampling_params"].get("n", 1))
        self.usage.requests += 1
        self.usage.sequences += n
        self.usage.tokens += n * self._reply_tokens
        self._advance()
        reply = generate_replies(body["input_ids"], n, self._reply_tokens, self.version)
        self._running.append((self._served + self._reply_tokens, n, reply, answer))
        self._sequences += n
        self._plan()

    def _rate(self) -> float:
        return min(self._sequence_rate, self._capacity / self._sequences)

    def _advance(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._sequences:
            self._served += (now - self._since) * self._rate()
        self._since = now

    def _plan(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if self._running:
            wait_s = max(0.0, (self._running[0][0] - self._served) / self._rate())
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._finish)

    def _finish(self) -> None:
        self._advance()
        while self._running and self._running[0][0] <= self._served + 1e-6:
            _, n, reply, answer = self._running.popleft()
            self._sequences -= n
            answer(reply)
        self._plan()


def generate_replies(context: Sequence[int], n: int, length: int, version: int) -> bytes:
    """SGLang's JSON for n replies: ids that follow from the context, the reply's number and the weights alone."""
    seed = hashlib.blake2b(array("l", context).tobytes(), digest_size=16, salt=b"%d" % version).digest()
    return b"[" + b",".join(_generated(seed, number, length, version) for number in range(n)) + b"]"


def _generated(seed: bytes, number: int, length: int, version: int) -> bytes:
    drawn = hashlib.shake_128(seed + b"%d" % number).digest(length - 1)
    ids = [FIRST_WORD + byte % NUM_WORDS for byte in drawn]
    tokens = b",".join([*(b"%d" % token for token in ids), END_BYTES])
    logprobs = b",".join([*(LOGPROB_ITEMS[token] for token in ids), END_ITEM])
    return (
        b'{"output_ids":[%b],"meta_info":{"finish_reason":{"type":"stop"},"output_token_logprobs":[%b],'
        b'"weight_version":"%d","cached_tokens":0,"completion_tokens":%d}}' % (tokens, logprobs, version, length)
    )


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
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.driver_servers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ready-file", type=Path, required=True)
    args = parser.parse_args()
    die_with_parent()
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(serve(partial(publish_text, args.ready_file)))


if __name__ == "__main__":
    run_cli(main)
