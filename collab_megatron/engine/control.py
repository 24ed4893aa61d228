"""Synchronous client of one SGLang server, for control: wait until ready, pause, update weights, continue.

The trainer's rank 0 and the launcher use it.
Endpoints: sglang/srt/entrypoints/http_server.py (0.5.23).
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx

from collab_megatron.engine.client import KEEPALIVE_S, EngineGone, EngineRefused, EngineSilent
from collab_megatron.engine.keys import EngineKeys
from collab_megatron.errors import RunError, UserError

PauseMode = Literal["in_place", "retract", "abort"]


@dataclass(frozen=True)
class BucketTensors:
    """The tensors of a flat bucket, in order, as SGLang's update call describes them."""

    names: list[str]
    dtypes: list[str]  # "float32", "bfloat16"
    shapes: list[list[int]]


class EngineControl:
    """Every call has a deadline and raises EngineGone, EngineSilent or EngineRefused with server, call and answer."""

    def __init__(self, url: str, *, timeout_s: float, keys: EngineKeys | None = None) -> None:
        """keys: None where the server asks for none."""
        self.url = url
        self._keys = keys
        self._timeout_s = timeout_s
        self._client = httpx.Client(
            base_url=url, timeout=timeout_s, trust_env=False, limits=httpx.Limits(keepalive_expiry=KEEPALIVE_S)
        )

    def close(self) -> None:
        self._client.close()

    def wait_until_ready(self, *, timeout_s: float, alive: Callable[[], bool] = lambda: True) -> float:
        """Seconds until /health answers 200. Raises RunError at the deadline or once `alive()` is False."""
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

    def answers(self, timeout_s: float) -> bool:
        """Whether the server's HTTP side answers, paused or not. Its ranks may hang all the same."""
        try:
            return self._client.get("/model_info", timeout=timeout_s, headers=self._header("model_info")).is_success
        except httpx.HTTPError:
            return False

    def pause(self, mode: PauseMode = "in_place") -> None:
        """Stop inference. Requests in flight go on after `resume`, with their cache (in_place) or without it (retract),
        or they are aborted."""
        self._post("pause_generation", {"mode": mode})

    def resume(self) -> None:
        self._post("continue_generation", {})

    def flush_cache(self, *, timeout_s: float = 10.0) -> bool:
        """Empty the prefix cache; False if requests in flight still use it after `timeout_s`."""
        try:
            self._post("flush_cache", {}, params={"timeout": timeout_s})
        except EngineRefused:
            return False
        return True

    def release_memory(self, tags: Sequence[str]) -> None:
        """Free device memory ("weights", "kv_cache"); the server must be idle."""
        self._post("release_memory_occupation", {"tags": list(tags)})

    def resume_memory(self, tags: Sequence[str]) -> None:
        """Allocate it again; the weights are undefined until the next update."""
        self._post("resume_memory_occupation", {"tags": list(tags)})

    def init_update_group(
        self, *, address: str, port: int, rank_offset: int, world_size: int, group_name: str, backend: str
    ) -> None:
        """The server's ranks join the group, from `rank_offset` on; returns once all members have joined."""
        self._post(
            "init_weights_update_group",
            {
                "master_address": address,
                "master_port": port,
                "rank_offset": rank_offset,
                "world_size": world_size,
                "group_name": group_name,
                "backend": backend,
            },
        )

    def destroy_update_group(self, group_name: str) -> None:
        """The server's ranks leave the group."""
        self._post("destroy_weights_update_group", {"group_name": group_name})

    def begin_update(self) -> None:
        """Open an update session, in which the server takes tensors, or go on with one that was left open."""
        try:
            self._post("begin_weight_update", {})
        except EngineRefused as error:
            if "already open" not in str(error):
                raise

    def end_update(self) -> None:
        self._post("end_weight_update", {})

    def receive_bucket(
        self, tensors: BucketTensors, *, group_name: str, packed: bool, weight_version: int | None
    ) -> None:
        """Receive a bucket by broadcast from rank 0 of the group, packed or tensor by tensor, and load its tensors.

        `weight_version` comes with the last bucket; tokens sampled from now on carry it.
        """
        body: dict[str, Any] = {
            "names": tensors.names,
            "dtypes": tensors.dtypes,
            "shapes": tensors.shapes,
            "group_name": group_name,
            "load_format": "flattened_bucket" if packed else None,
        }
        self._update("update_weights_from_distributed", body, weight_version)

    def load_handles(self, handles: Sequence[bytes], *, weight_version: int | None) -> None:
        """Load a flat bucket from shared memory: one pickled handle per tensor-parallel rank."""
        encoded = [base64.b64encode(handle).decode() for handle in handles]
        body: dict[str, Any] = {"serialized_named_tensors": encoded, "load_format": "flattened_bucket"}
        self._update("update_weights_from_tensor", body, weight_version)

    def load_folder(self, folder: Path, *, weight_version: int) -> None:
        """Load all safetensors files of a folder; needs no update session."""
        self._update("update_weights_from_disk", {"model_path": str(folder)}, weight_version)

    def _update(self, call: str, body: dict[str, Any], weight_version: int | None) -> None:
        # no flush here: SGLang counts one that requests in flight prevent as a failed update
        body["flush_cache"] = False
        if weight_version is not None:
            body["weight_version"] = str(weight_version)
        self._post(call, body)

    def start_profile(self, folder: Path, prefix: str, activities: Sequence[str]) -> None:
        """Trace the server's work from here on, "CPU" and "GPU"; files of `stop_profile` begin with `prefix`."""
        self._post(
            "start_profile", {"output_dir": str(folder), "profile_prefix": prefix, "activities": list(activities)}
        )

    def stop_profile(self) -> None:
        """Returns once the traces are written."""
        self._post("stop_profile", {})

    def weight_version(self) -> str:
        return str(self._call("GET", "model_info").get("weight_version"))

    def checksums(self, skip: Sequence[str] = ()) -> list[dict[str, str]]:
        """Per tensor-parallel rank {the server's own tensor name: hash in hex}, without names that contain a `skip`."""
        body = {"action": "checksum", "skip_tensor_list": list(skip)}
        reply = self._call("POST", "weights_checker", body)
        if not reply.get("success"):
            raise EngineRefused(f"engine {self.url} refused weights_checker: {reply.get('message')}")
        ranks = sorted(reply["ranks"], key=lambda rank: rank["parallelism_info"][0]["tp_rank"])
        return [rank["checksums"] for rank in ranks]

    def prompt_logprobs(self, input_ids: Sequence[int], *, cache_key: str) -> list[float]:
        """Log-probability of every id but the first, under the raw logits; computed again for every `cache_key`."""
        body = {
            "input_ids": list(input_ids),
            "sampling_params": {"temperature": 0.0, "max_new_tokens": 1},
            "return_logprob": True,
            "logprob_start_len": 0,
            "extra_key": cache_key,
        }
        entries = self._call("POST", "generate", body)["meta_info"]["input_token_logprobs"]
        return [float(entry[0]) for entry in entries[1:]]

    def greedy(
        self, input_ids: Sequence[int], *, max_new_tokens: int, stop_token_ids: Sequence[int]
    ) -> tuple[list[int], list[float]]:
        """A greedy reply and the log-probability of each token under the raw logits. For probes, not rollouts."""
        params = {"temperature": 0.0, "max_new_tokens": max_new_tokens, "stop_token_ids": list(stop_token_ids)}
        body = {"input_ids": list(input_ids), "sampling_params": params, "return_logprob": True}
        reply = self._call("POST", "generate", body)
        return list(reply["output_ids"]), [float(entry[0]) for entry in reply["meta_info"]["output_token_logprobs"]]

    def _header(self, call: str) -> Mapping[str, str] | None:
        return self._keys.header(call) if self._keys else None

    def _post(self, call: str, body: dict[str, Any], params: dict[str, Any] | None = None) -> None:
        reply = self._call("POST", call, body, params)
        if reply.get("success") is False:
            raise EngineRefused(f"engine {self.url} refused {call}: {reply.get('message')}")

    def _call(
        self, method: str, call: str, body: dict[str, Any] | None = None, params: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        try:
            response = self._client.request(method, f"/{call}", json=body, params=params, headers=self._header(call))
        except httpx.TimeoutException:
            raise EngineSilent(f"engine {self.url} did not answer {call} within {self._timeout_s:g} s") from None
        except httpx.HTTPError as error:
            raise EngineGone(f"engine {self.url} is gone during {call} ({type(error).__name__})") from None
        if response.status_code != 200:
            raise EngineRefused(f"engine {self.url} refused {call} ({response.status_code}): {response.text[:300]}")
        try:
            reply = response.json()
        except ValueError:
            return {"message": response.text}
        return reply if isinstance(reply, dict) else {"value": reply}


def served_weights(urls: Sequence[str], *, timeout_s: float) -> str:
    """A short name for the weights that running servers hold: 16 hex digits made from the servers' own checksums, or
    from the weight version of a server that has no checksums.

    Raises UserError where the servers hold different weights, RunError where one does not answer.
    """
    held, *others = {_held(url, timeout_s) for url in urls}
    if others:
        raise UserError(f"engine.urls: {', '.join(urls)} serve different weights: name servers of one model")
    return hashlib.blake2b(held.encode(), digest_size=8).hexdigest()


def _held(url: str, timeout_s: float) -> str:
    control = EngineControl(url, timeout_s=timeout_s)
    try:
        return json.dumps(control.checksums(), sort_keys=True)
    except EngineRefused:
        return control.weight_version()
    finally:
        control.close()
