"""An OpenAI-compatible HTTP endpoint for the demo's roles, on loopback.

Serves POST /v1/chat/completions, GET /v1/models and GET /health, with what LiteLLM uses: `n`, `seed`, `temperature`,
usage (counted in words), errors in OpenAI's format. If DESK_API_KEY is set, every /v1 call needs it as a bearer token.
Starts in a fraction of a second, without torch and transformers.

    python -m collab_megatron.demo.endpoint --port 0 --ready-file desk.address --die-with-parent

`--ready-file` receives `host:port` once the socket listens, so a launcher waits for the file and need not poll a port.
Exit code 0 after SIGTERM or SIGINT; 2, with one sentence on stderr, for an error such as a port in use or a bad path.
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import itertools
import json
import os
import random
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aiohttp import web

from collab_megatron.demo.mini_roles import learn_items
from collab_megatron.demo.scripted_roles import ROLES, answer
from collab_megatron.errors import UserError, run_cli
from collab_megatron.files import publish_text
from collab_megatron.log import log_of_server
from collab_megatron.signals import die_with_parent

API_KEY_VARIABLE = "DESK_API_KEY"
FINGERPRINT = "desk-1"
MAX_BODY_BYTES = 4 << 20
SHUTDOWN_S = 2.0


def complete(request: Mapping[str, Any], completion_id: str) -> dict[str, Any]:
    """The chat.completion object for a request; KeyError for an unknown model, ValueError for a malformed request."""
    if request.get("stream"):
        raise ValueError("stream is not supported by this endpoint")
    if request.get("seed") is None:
        request = {**request, "seed": random.getrandbits(31)}  # as with OpenAI, samples differ without a seed
    contents = answer(request)
    prompt_words = sum(len(message["content"].split()) for message in request["messages"])
    completion_words = sum(len(content.split()) for content in contents)
    choices = [
        {"index": i, "message": {"role": "assistant", "content": content}, "logprobs": None, "finish_reason": "stop"}
        for i, content in enumerate(contents)
    ]
    return {
        "id": completion_id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request["model"],
        "system_fingerprint": FINGERPRINT,
        "choices": choices,
        "usage": {
            "prompt_tokens": prompt_words,
            "completion_tokens": completion_words,
            "total_tokens": prompt_words + completion_words,
        },
    }


def build_app(api_key: str | None, answered: Path | None = None) -> web.Application:
    """The web application; `api_key` None or empty serves without authentication; `answered`: see --answered."""
    numbers = itertools.count(1)

    async def chat_completions(request: web.Request) -> web.Response:
        try:
            body = json.loads(await request.read())
        except (ValueError, RecursionError) as error:  # JSON or UTF-8
            return _error(400, f"the body is not JSON: {error}", "invalid_json")
        if not isinstance(body, dict):
            return _error(400, "the body must be a JSON object", "invalid_request")
        if not isinstance(body.get("model"), str) or body["model"] not in ROLES:
            known = ", ".join(ROLES)
            return _error(
                404, f"there is no model {body.get('model')!r}: use one of {known}", "model_not_found", "model"
            )
        try:
            completion = complete(body, f"chatcmpl-desk-{next(numbers)}")
        except ValueError as error:
            return _error(400, str(error), "invalid_request", "messages")
        if answered is not None:
            with answered.open("ab") as counter:
                counter.write(b".")
        return _json(200, completion)

    async def models(request: web.Request) -> web.Response:
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "collab_megatron"} for name in ROLES]
        return _json(200, {"object": "list", "data": data})

    async def health(request: web.Request) -> web.Response:
        return _json(200, {"status": "ok"})

    @web.middleware
    async def authorize(request: web.Request, handler: Any) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
        if request.path.startswith("/v1/") and not hmac.compare_digest(given, f"Bearer {api_key}".encode()):
            return _error(401, "the bearer token is missing or wrong", "invalid_api_key")
        response: web.StreamResponse = await handler(request)
        return response

    app = web.Application(middlewares=[authorize] if api_key else [], client_max_size=MAX_BODY_BYTES)
    app.router.add_post("/v1/chat/completions", chat_completions)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/health", health)
    return app


async def serve(
    host: str, port: int, ready_file: Path | None, api_key: str | None, answered: Path | None = None
) -> None:
    """Serve until SIGTERM or SIGINT. `port` 0 takes a free port. Raises UserError if the address cannot be bound."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    runner = web.AppRunner(
        build_app(api_key, answered), access_log=None, logger=log_of_server(), shutdown_timeout=SHUTDOWN_S
    )
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except (OSError, OverflowError, UnicodeError) as error:  # OverflowError: no port; UnicodeError: no host name
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"cannot listen on {host}:{port} ({reason}): choose another --port, or 0, or another --host"
            ) from error
        bound = runner.addresses[0][1]
        if ready_file is not None:
            publish_text(ready_file, f"{host}:{bound}")
        print(f"desk endpoint listens on http://{host}:{bound}/v1", flush=True)
        await stop.wait()
    finally:
        await runner.cleanup()


def _json(status: int, value: Any) -> web.Response:
    return web.Response(status=status, body=json.dumps(value).encode(), content_type="application/json")


def _error(status: int, message: str, code: str, param: str | None = None) -> web.Response:
    kind = "authentication_error" if status == 401 else "invalid_request_error"
    return _json(status, {"error": {"message": message, "type": kind, "param": param, "code": code}})


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m collab_megatron.demo.endpoint",
        description="Serve the demo's user simulator, judge and assistant over HTTP.",
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free port (default)")
    parser.add_argument("--ready-file", type=Path, help="receives host:port once the endpoint listens")
    parser.add_argument("--items", type=Path, help="folder of JSON lines that mini-assistant knows (conf/mini)")
    parser.add_argument("--answered", type=Path, help="gets one byte for each completion (what a provider would bill)")
    parser.add_argument("--die-with-parent", action="store_true", help="end when the starting process ends (Linux)")
    args = parser.parse_args()
    if args.ready_file is not None and not args.ready_file.parent.is_dir():
        raise UserError(f"--ready-file {args.ready_file}: there is no folder {args.ready_file.parent}; create it first")
    if args.items is not None:
        learn_items(args.items)
    if args.die_with_parent:
        die_with_parent()
    asyncio.run(serve(args.host, args.port, args.ready_file, os.environ.get(API_KEY_VARIABLE), args.answered))


if __name__ == "__main__":
    run_cli(main)
