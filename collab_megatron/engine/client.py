"""Asynchronous client of one SGLang server, for sampling: token ids in; tokens, log-probs and weight versions out."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from collab_megatron.engine.keys import EngineKeys
from collab_megatron.errors import RunError
from collab_megatron.types import Generation

# SGLang's server closes a connection that was idle for 5 s, and a request sent at that moment fails. Between two steps
# connections are idle as long as the update takes, so the client closes them earlier.
KEEPALIVE_S = 2.0

UNPUBLISHED = -1
"""Version number of weights that no trainer has published (SGLang's "default")."""


class EngineGone(RunError):
    """The connection broke or nobody listens: the server is dead, or one connection of many was lost."""


class EngineSilent(RunError):
    """No answer within the deadline: the server hangs, or waits for another one that does."""


class EngineRefused(RunError):
    """The server answered with an error."""


@dataclass(frozen=True)
class ServerLoad:
    """What a server reports of itself."""

    capacity_tokens: int  # of its KV cache; 0: not reported
    waiting_requests: int  # in its queue
    batch_times: tuple[float, ...] = ()  # when each scheduler last finished a batch, by its own clock


def open_session() -> aiohttp.ClientSession:
    """An HTTP session for any number of clients, each of which bounds its own requests. The caller closes it."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
        json_serialize=lambda value: orjson.dumps(value).decode(),
    )


class EngineClient:
    """One server; at most `max_concurrency` generate calls in flight."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        *,
        stop_token_ids: Sequence[int],
        timeout_s: float,
        max_concurrency: int,
        keys: EngineKeys | None = None,
    ) -> None:
        """keys: None where the server asks for none."""
        self.url = url
        self._keys = keys
        self._session = session
        self._stop_token_ids = list(stop_token_ids)
        self._timeout_s = timeout_s
        self._permits = asyncio.Semaphore(max_concurrency)

    async def generate(
        self,
        input_ids: Sequence[int],
        *,
        n: int,
        temperature: float,
        max_new_tokens: int,
        cache_key: str | None = None,
    ) -> list[Generation]:
        """n continuations of `input_ids`; waits for a permit, then for the server.

        The server's prefix cache serves only what was computed under the same `cache_key`.
        Raises EngineGone, EngineSilent, EngineRefused, or RunError for an answer that is no JSON; all name the server.
        """
        body: dict[str, Any] = {
            "input_ids": list(input_ids),
            "sampling_params": {
                "temperature": temperature,
                "max_new_tokens": max_new_tokens,
                "n": n,
                "stop_token_ids": self._stop_token_ids,
            },
            "return_logprob": True,
        }
        if cache_key is not None:
            body["extra_key"] = cache_key
        async with self._permits:
            payload = await self._call("POST", "generate", self._timeout_s, body)
        return [parse_generation(item) for item in (payload if isinstance(payload, list) else [payload])]

    async def weight_version(self, *, timeout_s: float) -> int:
        """The weight version that the server serves. It answers while it generates and while it is paused. Raises as
        `generate` does."""
        return version_number((await self._call("GET", "model_info", timeout_s)).get("weight_version"))

    async def load(self, *, timeout_s: float) -> ServerLoad:
        """The server's capacity, queue and progress. Raises as `generate` does."""
        loads = (await self._call("GET", "v1/loads?include=core", timeout_s)).get("loads") or [{}]
        return ServerLoad(
            capacity_tokens=sum(int(load.get("max_total_num_tokens", 0)) for load in loads),
            waiting_requests=sum(int(load.get("num_waiting_reqs", 0)) for load in loads),
            batch_times=tuple(float(load.get("timestamp", 0.0)) for load in loads),
        )

    async def paused(self, *, timeout_s: float) -> bool:
        """Whether the server is paused, as in every weight sync. SGLang has no call for it: a paused server answers
        /ready with 503 and /ping with 200. Raises as `generate` does, EngineRefused where the server lacks a call."""
        if await self._is_up("ready", timeout_s):
            return False
        return await self._is_up("ping", timeout_s)

    async def _is_up(self, call: str, timeout_s: float) -> bool:
        """Whether the answer is 200, not 503. Raises EngineRefused for anything else."""
        status, _ = await self._send("GET", call, timeout_s)
        if status not in (200, 503):
            raise EngineRefused(f"engine {self.url} refused {call} ({status})")
        return status == 200

    async def _call(self, method: str, call: str, timeout_s: float, body: dict[str, Any] | None = None) -> Any:
        status, payload = await self._send(method, call, timeout_s, body)
        if status != 200:
            text = payload[:300].decode(errors="replace")
            raise EngineRefused(f"engine {self.url} refused {call} ({status}): {text}")
        try:
            return orjson.loads(payload)
        except orjson.JSONDecodeError as error:
            raise RunError(f"engine {self.url} answered {call} with text that is no JSON ({error})") from None

    async def _send(
        self, method: str, call: str, timeout_s: float, body: dict[str, Any] | None = None
    ) -> tuple[int, bytes]:
        """Status and body of the answer."""
        try:
            async with self._session.request(
                method,
                f"{self.url}/{call}",
                json=body,
                headers=self._keys.header(call) if self._keys else None,
                timeout=aiohttp.ClientTimeout(total=timeout_s),
            ) as response:
                return response.status, await response.read()
        except TimeoutError:
            raise EngineSilent(f"engine {self.url} did not answer {call} within {timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise EngineGone(f"engine {self.url} is gone during {call} ({type(error).__name__}: {error})") from None


def parse_generation(item: dict[str, Any]) -> Generation:
    """One element of SGLang's /generate reply. Raises RunError for an aborted request."""
    meta = item["meta_info"]
    reason = meta["finish_reason"]["type"]
    if reason not in ("stop", "length"):
        raise RunError(f"the engine ended a generation with {meta['finish_reason']}")
    ids = tuple(item["output_ids"])
    logprobs = tuple(entry[0] for entry in meta["output_token_logprobs"])
    if len(logprobs) != len(ids):
        raise RunError(f"the engine returned {len(ids)} tokens with {len(logprobs)} log-probs")
    return Generation(
        token_ids_T=ids,
        logprobs_T=logprobs,
        versions_T=_versions(meta, len(ids)),
        finish_reason=reason,
        cached_tokens=meta.get("cached_tokens", 0),
    )


def version_number(value: object) -> int:
    """SGLang's weight version, which is free text, as the number that a trainer gave it; else UNPUBLISHED."""
    text = str(value)
    return int(text) if text.isdigit() else UNPUBLISHED


def _versions(meta: dict[str, Any], length: int) -> tuple[int, ...]:
    """The weight version of every token."""
    versions = [UNPUBLISHED] * length
    spans = meta.get("weight_versions") or [{"version": meta.get("weight_version"), "start": 0, "end": length}]
    for span in spans:
        number = version_number(span["version"])
        for t in range(span["start"], min(span["end"], length)):
            versions[t] = number
    return tuple(versions)
