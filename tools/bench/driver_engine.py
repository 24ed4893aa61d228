"""The engine stand-in of tools/bench/driver.py: a service rate shared by all sequences, replies of a fixed length.

Every sequence gets `min(sequence_rate, capacity / sequences)` tokens/s, so that its work is known: the tokens of all
replies / capacity. All sequences are equally long and fast, so they end in the order in which they came, and one
count of the tokens that each of them has got (`_served`) tells when.
"""

from __future__ import annotations

import asyncio
import hashlib
from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

END_ID = 2  # the demo tokenizer's end of turn
FIRST_WORD, NUM_WORDS = 70, 108  # ids of the demo tokenizer that are plain words, without digits
LOGPROB_ITEMS = tuple(b"[-0.5,%d,null]" % token for token in range(FIRST_WORD + NUM_WORDS))
END_BYTES, END_ITEM = b"%d" % END_ID, b"[-0.5,%d,null]" % END_ID

Answer = Callable[[bytes], None]


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
        reply = replies(body["input_ids"], n, self._reply_tokens, self.version)
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


def replies(context: Sequence[int], n: int, length: int, version: int) -> bytes:
    """SGLang's JSON for n replies: ids that follow from the context, the reply's number and the weights alone."""
    seed = hashlib.blake2b(array("l", context).tobytes(), digest_size=16, salt=b"%d" % version).digest()
    return b"[" + b",".join(_reply(seed, number, length, version) for number in range(n)) + b"]"


def _reply(seed: bytes, number: int, length: int, version: int) -> bytes:
    drawn = hashlib.shake_128(seed + b"%d" % number).digest(length - 1)
    ids = [FIRST_WORD + byte % NUM_WORDS for byte in drawn]
    tokens = b",".join([*(b"%d" % token for token in ids), END_BYTES])
    logprobs = b",".join([*(LOGPROB_ITEMS[token] for token in ids), END_ITEM])
    return (
        b'{"output_ids":[%b],"meta_info":{"finish_reason":{"type":"stop"},"output_token_logprobs":[%b],'
        b'"weight_version":"%d","cached_tokens":0,"completion_tokens":%d}}' % (tokens, logprobs, version, length)
    )
