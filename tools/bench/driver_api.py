"""The simulator and judge endpoint of tools/bench/driver.py: OpenAI-compatible, lognormal latencies, a trace of calls.

A call is named by its messages and by how many different seeds came with the same messages before it, so that whatever
seeds a control flow draws, the futures of a reply are asked the same things and take the same time: the flows share one
trace. A user's text carries the call's name as twelve number words, and every later call of that conversation shows it
in its chat: that links the calls to chains.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

# sixteen words that the demo tokenizer knows, so that two conversations differ in their token ids too
WORDS = ("2", "3", "4", "5", "6", "7", "8", "9", "10", "12", "15", "18", "20", "24", "30", "36")
NAME_WORDS = 12
SAYS = "it is "
NAME = re.compile(rf"(?:(?:{'|'.join(WORDS)})\b ?){{{NAME_WORDS}}}(?<! )")
FAILURE = b'{"error":{"message":"the stand-in fails once","type":"server_error","code":500}}'


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
    """What the simulated user says: no end of the chat, so that every chain has its full length."""
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
