"""Asks an SGLang server for policy turns: token ids in, token ids with log-probs and weight versions out."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import aiohttp
import orjson

from collab_megatron.errors import RunError
from collab_megatron.types import Generation

# SGLang's server closes a connection that was idle for 5 s; one taken from the pool at that moment fails. Between two
# steps connections are idle for as long as the update takes, so ours are given up well before.
KEEPALIVE_S = 2.0


class EngineClient:
    """One server behind one connection pool; at most `max_concurrency` requests in flight. Use as a context manager."""

    def __init__(self, url: str, *, stop_token_ids: Sequence[int], timeout_s: float, max_concurrency: int) -> None:
        self._url = url
        self._stop_token_ids = list(stop_token_ids)
        self._timeout_s = timeout_s
        self._slots = asyncio.Semaphore(max_concurrency)
        self._max_concurrency = max_concurrency
        self._session: aiohttp.ClientSession | None = None
        self.requests = 0
        self.generated_tokens = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0

    async def __aenter__(self) -> EngineClient:
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=self._timeout_s),
            connector=aiohttp.TCPConnector(limit=self._max_concurrency, keepalive_timeout=KEEPALIVE_S),
            json_serialize=lambda value: orjson.dumps(value).decode(),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def generate(
        self, input_ids: Sequence[int], *, n: int, temperature: float, max_new_tokens: int
    ) -> list[Generation]:
        """n continuations of `input_ids`; waits for a slot, then for the server.

        Raises RunError naming the server if it does not answer within the deadline or refuses.
        """
        if self._session is None:
            raise RuntimeError("EngineClient is used outside its `async with`")
        body = {
            "input_ids": list(input_ids),
            "sampling_params": {
                "temperature": temperature,
                "max_new_tokens": max_new_tokens,
                "n": n,
                "stop_token_ids": self._stop_token_ids,
            },
            "return_logprob": True,
        }
        async with self._slots:
            payload = await self._post(self._session, body)
        items = payload if isinstance(payload, list) else [payload]
        generations = [parse_generation(item) for item in items]
        self.requests += 1
        self.prompt_tokens += len(input_ids) * n
        self.generated_tokens += sum(len(g.token_ids_T) for g in generations)
        self.cached_tokens += sum(g.cached_tokens for g in generations)
        return generations

    async def _post(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> Any:
        try:
            async with session.post(f"{self._url}/generate", json=body) as response:
                payload = orjson.loads(await response.read())
        except TimeoutError:
            raise RunError(f"engine {self._url} did not answer a generate call within {self._timeout_s:g} s") from None
        except aiohttp.ClientError as error:
            raise RunError(f"engine {self._url} is gone during generate ({type(error).__name__}: {error})") from None
        if response.status != 200:
            raise RunError(f"engine {self._url} refused a generate call ({response.status}): {str(payload)[:300]}")
        return payload


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


def _versions(meta: dict[str, Any], length: int) -> tuple[int, ...]:
    """The weight version of every token; -1 for weights that no trainer has published ("default")."""
    versions = [-1] * length
    spans = meta.get("weight_versions") or [{"version": meta.get("weight_version"), "start": 0, "end": length}]
    for span in spans:
        text = str(span["version"])
        number = int(text) if text.isdigit() else -1
        for t in range(span["start"], min(span["end"], length)):
            versions[t] = number
    return tuple(versions)
