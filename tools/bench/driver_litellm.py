"""Bare LiteLLM calls without the driver, and their CPU time.

    python -m tools.bench.driver_litellm --url URL --calls N --json FILE

The calls are like the driver's: N of them with a user simulator's prompt, IN_FLIGHT at a time, one process, uvloop.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import time
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from collab_megatron.config.sections import UserSection
from collab_megatron.errors import run_cli
from collab_megatron.files import publish_json
from collab_megatron.rollout.llm import LLMUserSimulator
from collab_megatron.rollout.llm.litellm_api import MANY_CONNECTIONS as CONNECTIONS
from collab_megatron.signals import die_with_parent
from collab_megatron.types import LLMRequest, Message, Task

# LiteLLM's own limits are 1000 connections and 500 to one host, and what waits there counts as the provider's slowness;
# 0 would not lift them, but mean aiohttp's default of 100
MANY_CONNECTIONS = dict.fromkeys(("AIOHTTP_CONNECTOR_LIMIT", "AIOHTTP_CONNECTOR_LIMIT_PER_HOST"), CONNECTIONS)
PROVIDER = "hosted_vllm"
IN_FLIGHT = 64
WARM_UP_CALLS = 100

T = TypeVar("T")


def load_litellm() -> Any:
    """The module with the driver's own settings (no network, no callbacks, a known price)."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm  # after the variable

    litellm.telemetry = False
    litellm.suppress_debug_info = True
    litellm.num_retries = 0
    free = {"input_cost_per_token": 0.0, "output_cost_per_token": 0.0, "mode": "chat", "litellm_provider": PROVIDER}
    litellm.register_model({f"{PROVIDER}/{role}": free for role in ("user", "judge")})
    return litellm


class BareLLM:
    """A types.ChatLLM: one call, and after a failure of the server another one, `failure_wait_s` or more later."""

    def __init__(self, litellm: Any, url: str, role: str, *, in_flight: int, failure_wait_s: float = 0.0) -> None:
        self._litellm = litellm
        self._api_base = f"{url}/v1"
        self._role = role
        self._slots = asyncio.Semaphore(in_flight)
        self._failure_wait_s = failure_wait_s

    async def complete(self, request: LLMRequest[T]) -> list[T]:
        """The text as it comes; waits without end, since the stand-in fails a call only once."""
        wire = [message.as_dict() for message in request.messages]
        attempt = 0
        while True:
            try:
                async with self._slots:
                    response = await self._call(wire, request.sample_index)
            except self._litellm.InternalServerError:
                await asyncio.sleep(max(self._failure_wait_s * 2**attempt / 60, self._failure_wait_s))
                attempt += 1
            else:
                return [request.parse(response.choices[0].message.content)]

    async def _call(self, wire: list[dict[str, str]], seed: int) -> Any:
        return await self._litellm.acompletion(
            model=f"{PROVIDER}/{self._role}",
            messages=wire,
            api_base=self._api_base,
            api_key="no-key",
            temperature=1.0,
            max_tokens=256,
            seed=seed,
            timeout=600.0,
            max_retries=0,
            num_retries=0,
            response_format={"type": "json_object"},
        )


async def cpu_ms_per_call(url: str, calls: int) -> float:
    """Milliseconds of CPU time of one call, building its prompt included."""
    user = LLMUserSimulator(UserSection(model=PROVIDER), BareLLM(load_litellm(), url, "user", in_flight=IN_FLIGHT))
    words = "the room is for two people and the morning train is at nine or ten on friday " * 2
    task = Task("t", (Message("user", words),), words, words)
    chat = [*task.prompt, Message("assistant", words), Message("user", words[:60]), Message("assistant", words)]
    await asyncio.gather(*(user.reply(task, chat, sample_index=i) for i in range(WARM_UP_CALLS)))
    gc.collect()
    gc.freeze()  # as the driver does
    start = time.process_time()
    await asyncio.gather(*(user.reply(task, chat, sample_index=WARM_UP_CALLS + i) for i in range(calls)))
    return (time.process_time() - start) / calls * 1000


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.driver_litellm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--url", required=True, help="of tools/bench/driver_servers.py")
    parser.add_argument("--calls", type=int, required=True)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    die_with_parent()
    publish_json(args.json, {"cpu_ms": uvloop.run(cpu_ms_per_call(args.url, args.calls))})


if __name__ == "__main__":
    run_cli(main)
