"""A fast stand-in for the policy's servers and the LLM endpoint of driver tests: one process, real HTTP, no model.

    python -m tests.rollout.stand_in --ready-file FILE [--latency-ms 20] [--seed 1]

FILE receives `host:port`. POST /generate, GET /model_info and GET /health speak as SGLang does, and
POST /v1/chat/completions as OpenAI does, for the models "user" and "judge" (LiteLLM: hosted_vllm/user). POST
/set_version?v=N sets the weight version, 0 at first. An answer depends on the request alone, never on what came before;
the latency does not.

GET /counts tells what was asked for:
- paid: chat completions that went out to a client that was there. One that was killed before is not counted.
- repeated: of these, those whose body is byte for byte that of an earlier one.
- repeats: for each of those, in seconds since the epoch, when the earlier answer went out and when this request came. A
  process that is killed between an answer's arrival and its commit must ask again; these times tell such cases.
- turns, turns_repeated: paid and repeated of /generate.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import random
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import uvloop
from aiohttp import web

from collab_megatron.demo.tokenizer import build_tokenizer
from collab_megatron.files import publish_text
from collab_megatron.signals import die_with_parent
from collab_megatron.types import TERMINATION_SIGNAL

SHORTEST, LONGEST = 2, 12
"""Words of a policy turn."""
END_SHARE = 0.2
"""Of the user's turns: they end the chat."""
MARKS = ("understanding", "clarification", "suggestion")

Answer = Callable[[dict[str, Any]], Any]


class Vocabulary:
    """The demo tokenizer's words, which need no model folder."""

    def __init__(self) -> None:
        tokenizer = build_tokenizer()
        self.end_id: int = tokenizer.eos_token_id
        # a token is a word with the space before it; what has angle brackets is special or spare
        self.tokens: dict[int, str] = {i: token for token, i in tokenizer.get_vocab().items() if "<|" not in token}
        self.ids = sorted(i for i, token in self.tokens.items() if token.startswith(" ") and token.strip().isalnum())


def turn(vocabulary: Vocabulary, input_ids: Sequence[int], index: int, limit: int) -> tuple[list[int], list[float]]:
    """Ids and log-probs of the `index`-th of a request's turns; at most `limit` tokens, else ended by the end token."""
    rng = seeded("turn", list(input_ids), index)
    ids = [*rng.choices(vocabulary.ids, k=rng.randint(SHORTEST, LONGEST)), vocabulary.end_id]
    return ids[:limit], [-3.0 * rng.random() for _ in ids[:limit]]


def user_text(vocabulary: Vocabulary, messages: object, seed: object, index: int) -> str:
    """What the simulated user's prompt wants: an object with thought and response."""
    rng = seeded("user", messages, seed, index)
    words = "".join(vocabulary.tokens[i] for i in rng.choices(vocabulary.ids, k=rng.randint(2, 6))).strip()
    ending = f" {TERMINATION_SIGNAL}" if rng.random() < END_SHARE else ""
    return json.dumps({"thought": "as the request says", "response": words + ending})


def judge_text(messages: object, seed: object, index: int) -> str:
    """What each judge's prompt wants: the marks of interactivity, the verdicts of accuracy and of a pair."""
    rng = seeded("judge", messages, seed, index)
    marks = {name: round(rng.random(), 2) for name in MARKS}
    correct = rng.random() < 0.5
    better = rng.choice(("first", "second", "neither"))
    return json.dumps({"thought": "it went as it went", **marks, "correct": correct, "better": better})


def seeded(*content: object) -> random.Random:
    return random.Random(hashlib.blake2b(orjson.dumps(content), digest_size=8).digest())


@dataclass
class Counts:
    """What was asked for at one address."""

    answered: int = 0
    repeats: list[tuple[float, float]] = field(default_factory=list)
    sent_at: dict[bytes, float] = field(default_factory=dict)  # body's hash -> when its last answer went out

    def add(self, body: bytes, came_at: float) -> None:
        key = hashlib.blake2b(body, digest_size=16).digest()
        self.answered += 1
        if key in self.sent_at:
            self.repeats.append((self.sent_at[key], came_at))
        self.sent_at[key] = time.time()


class StandIn:
    """The answers and what is counted of them."""

    def __init__(self, *, latency_s: float, seed: int) -> None:
        """`latency_s` is the mean; from zero to twice as much."""
        self._vocabulary = Vocabulary()
        self._latency_s = latency_s
        self._rng = random.Random(seed)
        self._version = "0"
        self._counts = {"chat": Counts(), "generate": Counts()}

    def app(self) -> web.Application:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post("/generate", self._counted("generate", self._generate))
        app.router.add_post("/v1/chat/completions", self._counted("chat", self._chat))
        app.router.add_post("/set_version", self._set_version)
        app.router.add_get("/model_info", self._model_info)
        app.router.add_get("/health", self._model_info)
        app.router.add_get("/counts", self._figures)
        return app

    def _counted(self, what: str, answer: Answer) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            came_at = time.time()
            body = await request.read()
            await asyncio.sleep(self._rng.uniform(0.0, 2.0 * self._latency_s))
            response = web.Response(body=orjson.dumps(answer(orjson.loads(body))), content_type="application/json")
            if request.transport is not None and not request.transport.is_closing():
                self._counts[what].add(body, came_at)
            return response

        return handle

    def _generate(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        sampling = body["sampling_params"]
        return [self._one(body["input_ids"], i, sampling["max_new_tokens"]) for i in range(sampling["n"])]

    def _one(self, input_ids: Sequence[int], index: int, limit: int) -> dict[str, Any]:
        ids, logprobs = turn(self._vocabulary, input_ids, index, limit)
        ended = ids[-1] == self._vocabulary.end_id
        return {
            "output_ids": ids,
            "meta_info": {
                "finish_reason": {"type": "stop" if ended else "length"},
                "output_token_logprobs": [[logprob, token, None] for logprob, token in zip(logprobs, ids, strict=True)],
                "weight_version": self._version,
                "prompt_tokens": len(input_ids),
                "completion_tokens": len(ids),
                "cached_tokens": 0,
            },
        }

    def _chat(self, body: dict[str, Any]) -> dict[str, Any]:
        messages, seed = body["messages"], body.get("seed")
        texts = [
            user_text(self._vocabulary, messages, seed, i) if body["model"] == "user" else judge_text(messages, seed, i)
            for i in range(body.get("n") or 1)
        ]
        asked = sum(len(message["content"].split()) for message in messages)
        said = sum(len(text.split()) for text in texts)
        return {
            "id": "chatcmpl-stand-in",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "system_fingerprint": "stand-in",
            "choices": [
                {"index": i, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
                for i, text in enumerate(texts)
            ],
            "usage": {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said},
        }

    async def _set_version(self, request: web.Request) -> web.Response:
        self._version = request.query["v"]
        return web.json_response({"success": True})

    async def _model_info(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": self._version})

    async def _figures(self, request: web.Request) -> web.Response:
        chat, turns = self._counts["chat"], self._counts["generate"]
        return web.json_response(
            {
                "paid": chat.answered,
                "repeated": len(chat.repeats),
                "repeats": chat.repeats,
                "turns": turns.answered,
                "turns_repeated": len(turns.repeats),
            }
        )


async def serve(stand_in: StandIn, ready_file: Path) -> None:
    """Until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    runner = web.AppRunner(stand_in.app(), access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        publish_text(ready_file, "{}:{}".format(*runner.addresses[0]))
        await stop.wait()
    finally:
        await runner.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a stand-in for policy servers and LLM endpoint.")
    parser.add_argument("--ready-file", type=Path, required=True)
    parser.add_argument("--latency-ms", type=float, default=0.0, help="mean; each answer takes from 0 to twice as much")
    parser.add_argument("--seed", type=int, default=1, help="of the latencies")
    args = parser.parse_args()
    die_with_parent()
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(serve(StandIn(latency_s=args.latency_ms / 1000, seed=args.seed), args.ready_file))


if __name__ == "__main__":
    main()
