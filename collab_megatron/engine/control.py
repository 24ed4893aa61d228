"""Control calls to one SGLang server: wait until ready, pause, update, continue.

Synchronous: the trainer's rank 0 and the launcher use it.
Endpoints: sglang/srt/entrypoints/http_server.py (0.5.23).
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx

from collab_megatron.engine.client import KEEPALIVE_S
from collab_megatron.engine.keys import EngineKeys
from collab_megatron.errors import RunError

PauseMode = Literal["in_place", "retract", "abort"]


class Refused(RunError):
    """The server answered, and said no."""


class Gone(RunError):
    """Nobody listens at the server's address, or the connection broke: the server is dead."""


class Silent(RunError):
    """No answer within the deadline: the server hangs, or waits for somebody who does."""


@dataclass(frozen=True)
class BucketTensors:
    """What lies in a flat bucket, in order, as SGLang's update call wants it said."""

    names: list[str]
    dtypes: list[str]  # "float32", "bfloat16"
    shapes: list[list[int]]


class EngineControl:
    """Every call has a deadline; every error names the server, the call and what it said."""

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

    def answers(self, timeout_s: float) -> bool:
        """Whether the server's HTTP side is alive; says nothing of its ranks, and is true while it is paused."""
        try:
            return self._client.get("/model_info", timeout=timeout_s, headers=self._header("model_info")).is_success
        except httpx.HTTPError:
            return False

    def pause(self, mode: PauseMode = "in_place") -> None:
        """Stop inference. Requests in flight keep their cache (in_place) or lose it (retract) and go on after `resume`;
        or they end as aborted."""
        self._post("pause_generation", {"mode": mode})

    def resume(self) -> None:
        self._post("continue_generation", {})

    def flush_cache(self, *, timeout_s: float = 10.0) -> bool:
        """Empty the prefix cache; False if requests in flight still use it after `timeout_s`."""
        try:
            self._post("flush_cache", {}, params={"timeout": timeout_s})
        except Refused:
            return False
        return True

    def release_memory(self, tags: Sequence[str]) -> None:
        """Give device memory back ("weights", "kv_cache"); the server must be idle."""
        self._post("release_memory_occupation", {"tags": list(tags)})

    def resume_memory(self, tags: Sequence[str]) -> None:
        """Take it again; weights hold nothing until the next update."""
        self._post("resume_memory_occupation", {"tags": list(tags)})

    def init_update_group(
        self, *, address: str, port: int, rank_offset: int, world_size: int, group_name: str, backend: str
    ) -> None:
        """The server's ranks join the group as `rank_offset`, ...; blocks until all members have joined."""
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
        """Open a session, in which tensors are received. A session that an interrupted sync left open is taken over."""
        try:
            self._post("begin_weight_update", {})
        except Refused as error:
            if "already open" not in str(error):
                raise

    def end_update(self) -> None:
        self._post("end_weight_update", {})

    def receive_bucket(
        self, tensors: BucketTensors, *, group_name: str, packed: bool, weight_version: int | None
    ) -> None:
        """Receive a bucket by broadcast from rank 0 of the group, in one piece (`packed`) or tensor by tensor, and load
        its tensors.

        With `weight_version` (on the last bucket) the tokens sampled from now on carry it.
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
        """Load a flat bucket from memory of this machine: one pickled handle per tensor-parallel rank."""
        encoded = [base64.b64encode(handle).decode() for handle in handles]
        body: dict[str, Any] = {"serialized_named_tensors": encoded, "load_format": "flattened_bucket"}
        self._update("update_weights_from_tensor", body, weight_version)

    def load_folder(self, folder: Path, *, weight_version: int) -> None:
        """Load all safetensors files of a folder; needs no session."""
        self._update("update_weights_from_disk", {"model_path": str(folder)}, weight_version)

    def _update(self, call: str, body: dict[str, Any], weight_version: int | None) -> None:
        # SGLang counts a flush that is refused, because requests are in flight, as a failed update: we flush apart
        body["flush_cache"] = False
        if weight_version is not None:
            body["weight_version"] = str(weight_version)
        self._post(call, body)

    def weight_version(self) -> str:
        return str(self._call("GET", "model_info").get("weight_version"))

    def checksums(self, skip: Sequence[str] = ()) -> list[dict[str, str]]:
        """Per tensor-parallel rank {the server's own tensor name: hash in hex}, without names that contain a `skip`."""
        body = {"action": "checksum", "skip_tensor_list": list(skip)}
        reply = self._call("POST", "weights_checker", body)
        if not reply.get("success"):
            raise Refused(f"engine {self.url} refused weights_checker: {reply.get('message')}")
        ranks = sorted(reply["ranks"], key=lambda rank: rank["parallelism_info"][0]["tp_rank"])
        return [rank["checksums"] for rank in ranks]

    def prompt_logprobs(self, input_ids: Sequence[int], *, cache_key: str) -> list[float]:
        """Log-probability of every id but the first, under the raw logits; computed anew for every `cache_key`."""
        body = {
            "input_ids": list(input_ids),
            "sampling_params": {"temperature": 0.0, "max_new_tokens": 1},
            "return_logprob": True,
            "logprob_start_len": 0,
            "extra_key": cache_key,
        }
        entries = self._call("POST", "generate", body)["meta_info"]["input_token_logprobs"]
        return [float(entry[0]) for entry in entries[1:]]

    def generate(self, input_ids: Sequence[int], *, max_new_tokens: int, stop_token_ids: Sequence[int]) -> list[int]:
        """Greedy token ids; for probes, not for rollouts."""
        params = {"temperature": 0.0, "max_new_tokens": max_new_tokens, "stop_token_ids": list(stop_token_ids)}
        reply = self._call("POST", "generate", {"input_ids": list(input_ids), "sampling_params": params})
        return list(reply["output_ids"])

    def greedy(
        self, input_ids: Sequence[int], *, max_new_tokens: int, stop_token_ids: Sequence[int]
    ) -> tuple[list[int], list[float]]:
        """As `generate`, with the log-probability of each token under the raw logits."""
        params = {"temperature": 0.0, "max_new_tokens": max_new_tokens, "stop_token_ids": list(stop_token_ids)}
        body = {"input_ids": list(input_ids), "sampling_params": params, "return_logprob": True}
        reply = self._call("POST", "generate", body)
        return list(reply["output_ids"]), [float(entry[0]) for entry in reply["meta_info"]["output_token_logprobs"]]

    def _header(self, call: str) -> Mapping[str, str] | None:
        return self._keys.header(call) if self._keys else None

    def _post(self, call: str, body: dict[str, Any], params: dict[str, Any] | None = None) -> None:
        reply = self._call("POST", call, body, params)
        if reply.get("success") is False:
            raise Refused(f"engine {self.url} refused {call}: {reply.get('message')}")

    def _call(
        self, method: str, call: str, body: dict[str, Any] | None = None, params: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        try:
            response = self._client.request(method, f"/{call}", json=body, params=params, headers=self._header(call))
        except httpx.TimeoutException:
            raise Silent(f"engine {self.url} did not answer {call} within {self._timeout_s:g} s") from None
        except httpx.HTTPError as error:
            raise Gone(f"engine {self.url} is gone during {call} ({type(error).__name__})") from None
        if response.status_code != 200:
            raise Refused(f"engine {self.url} refused {call} ({response.status_code}): {response.text[:300]}")
        try:
            reply = response.json()
        except ValueError:
            return {"message": response.text}
        return reply if isinstance(reply, dict) else {"value": reply}
