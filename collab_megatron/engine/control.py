"""Control calls to one SGLang server: wait until ready, pause, update, continue.

Synchronous: the trainer's rank 0 and the launcher use it.
Endpoints: sglang/srt/entrypoints/http_server.py (0.5.23).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from collab_megatron.engine.client import KEEPALIVE_S
from collab_megatron.errors import RunError


class EngineControl:
    """Every call has a deadline; every error names the server, the call and what it said."""

    def __init__(self, url: str, *, timeout_s: float) -> None:
        self.url = url
        self._timeout_s = timeout_s
        self._client = httpx.Client(
            base_url=url, timeout=timeout_s, trust_env=False, limits=httpx.Limits(keepalive_expiry=KEEPALIVE_S)
        )

    def close(self) -> None:
        self._client.close()

    def wait_until_ready(self, *, timeout_s: float, alive: Callable[[], bool] = lambda: True) -> float:
        """Seconds until /health answered 200. Raises RunError at the deadline or once `alive()` is False."""
        start = time.monotonic()
        while True:
            try:
                if self._client.get("/health", timeout=5.0).status_code == 200:
                    return time.monotonic() - start
            except httpx.HTTPError as error:
                last = type(error).__name__
            else:
                last = "not ready"
            if not alive():
                raise RunError(f"engine {self.url} died while starting")
            if time.monotonic() - start > timeout_s:
                raise RunError(f"engine {self.url} was not ready within {timeout_s:g} s ({last})")
            time.sleep(0.2)

    def pause(self) -> None:
        """Stop inference in place: requests in flight keep their state and go on after `resume`."""
        self._post("pause_generation", {"mode": "in_place"})

    def resume(self) -> None:
        self._post("continue_generation", {})

    def flush_cache(self) -> None:
        self._post("flush_cache", {}, params={"timeout": 10})

    def init_update_group(self, *, address: str, port: int, world_size: int, group_name: str, backend: str) -> None:
        """The engine's ranks join the update group as ranks 1 .. world_size-1; blocks until all have joined."""
        self._post(
            "init_weights_update_group",
            {
                "master_address": address,
                "master_port": port,
                "rank_offset": 1,
                "world_size": world_size,
                "group_name": group_name,
                "backend": backend,
            },
        )

    def destroy_update_group(self, group_name: str) -> None:
        """The engine's ranks leave the group."""
        self._post("destroy_weights_update_group", {"group_name": group_name})

    def begin_update(self) -> None:
        self._post("begin_weight_update", {})

    def end_update(self) -> None:
        self._post("end_weight_update", {})

    def receive_bucket(
        self,
        *,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group_name: str,
        weight_version: int | None,
    ) -> None:
        """The engine receives these tensors, in this order, by broadcast from rank 0 of the group.

        With `weight_version` (on the last bucket) the engine's version is raised; the prefix cache is flushed by the
        caller once, not per bucket.
        """
        body: dict[str, Any] = {
            "names": list(names),
            "dtypes": list(dtypes),
            "shapes": [list(shape) for shape in shapes],
            "group_name": group_name,
            "flush_cache": weight_version is not None,
        }
        if weight_version is not None:
            body["weight_version"] = str(weight_version)
        self._post("update_weights_from_distributed", body)

    def weight_version(self) -> str:
        return str(self._call("GET", "model_info").get("weight_version"))

    def generate(self, input_ids: Sequence[int], *, max_new_tokens: int, stop_token_ids: Sequence[int]) -> list[int]:
        """Greedy token ids; for probes, not for rollouts."""
        params = {"temperature": 0.0, "max_new_tokens": max_new_tokens, "stop_token_ids": list(stop_token_ids)}
        reply = self._call("POST", "generate", {"input_ids": list(input_ids), "sampling_params": params})
        return list(reply["output_ids"])

    def _post(self, call: str, body: dict[str, Any], params: dict[str, Any] | None = None) -> None:
        reply = self._call("POST", call, body, params)
        if reply.get("success") is False:
            raise RunError(f"engine {self.url} refused {call}: {reply.get('message')}")

    def _call(
        self, method: str, call: str, body: dict[str, Any] | None = None, params: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        try:
            response = self._client.request(method, f"/{call}", json=body, params=params)
        except httpx.TimeoutException:
            raise RunError(f"engine {self.url} did not answer {call} within {self._timeout_s:g} s") from None
        except httpx.HTTPError as error:
            raise RunError(f"engine {self.url} is gone during {call} ({type(error).__name__})") from None
        if response.status_code != 200:
            raise RunError(f"engine {self.url} refused {call} ({response.status_code}): {response.text[:300]}")
        try:
            reply = response.json()
        except ValueError:
            return {"message": response.text}
        return reply if isinstance(reply, dict) else {"value": reply}
