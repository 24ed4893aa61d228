"""The measured driver of tools/bench/driver.py: real processes, called by the trainer's client; their CPU and memory.

All of the benchmark's knowledge of the driver's interface is here.
"""

from __future__ import annotations

import secrets
import sys
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import httpx
import psutil

from collab_megatron.config import RLConfig, dump_config
from collab_megatron.errors import RunError
from collab_megatron.files import publish_secret, publish_text
from collab_megatron.launch.child_process import ChildProcess
from collab_megatron.launch.supervisor import Supervisor
from collab_megatron.types import RolloutBatch
from collab_megatron.wire.protocol import DriverClient

MAX_CONTEXT_TOKENS = 4096
READY_S, STEP_S, CALL_S = 120.0, 1800.0, 60.0


class StandInsClient:
    """Control of tools/bench/driver_servers.py."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._client = httpx.Client(base_url=url, timeout=CALL_S, trust_env=False)

    def begin(self, settings: dict[str, Any]) -> None:
        """Start a new trace with these settings."""
        self._client.post("/settings", json=settings).raise_for_status()

    def set_version(self, version: int) -> None:
        """Set the engine's weight version."""
        self._client.post("/version", json={"version": version}).raise_for_status()

    def trace(self) -> dict[str, Any]:
        """The calls since `begin`."""
        trace: dict[str, Any] = self._client.get("/trace").raise_for_status().json()
        return trace

    def close(self) -> None:
        self._client.close()


@dataclass
class Driver:
    """All shards of one driver, started for the length of a `with` block and warmed up by an evaluation."""

    config: RLConfig
    supervisor: Supervisor
    environment: dict[str, str]
    stand_ins: StandInsClient
    children: list[ChildProcess] = field(default_factory=list)

    def __enter__(self) -> Driver:
        folder = self.config.run.dir
        resolved = folder / "resolved.yaml"
        publish_text(resolved, dump_config(self.config))
        addresses = []
        token_file = self.supervisor.scratch / f"{folder.name}.token"
        publish_secret(token_file, secrets.token_hex(32))
        for shard in range(self.config.driver.shards):
            ready = folder / f"driver-{shard}.address"
            argv = [sys.executable, "-m", "collab_megatron.rollout.service", str(resolved), "--first-step", "0"]
            argv += ["--max-context-tokens", str(MAX_CONTEXT_TOKENS), "--ready-file", str(ready)]
            socket = self.supervisor.scratch / f"{folder.name}-{shard}.socket"
            argv += ["--address", f"ipc://{socket}", "--token-file", str(token_file), "--logs-dir", str(folder)]
            if self.config.driver.shards > 1:
                argv += ["--shard", str(shard)]
            name = f"{folder.name}-driver-{shard}"
            child = self.supervisor.start(name, argv, self.environment)
            self.children.append(child)
            addresses.append((ready, child))
        self._client = DriverClient(
            [self.supervisor.wait_for_file(ready, child, timeout_s=READY_S).strip() for ready, child in addresses],
            token_file.read_bytes(),
        )
        self.stand_ins.begin({})
        self._client.evaluate(0, 0, self._engines, timeout_s=STEP_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:  # otherwise the supervisor ends them
            self._client.stop()
            self.supervisor.wait_for(self.children, timeout_s=CALL_S)
        self._client.close()

    @property
    def _engines(self) -> tuple[str, ...]:
        return (self.stand_ins.url,)

    def next_batch(self, step: int, version: int) -> tuple[RolloutBatch, float]:
        """The batch of a step and the seconds waited for it. Raises RunError if samples are missing."""
        self.supervisor.check()
        start = time.monotonic()
        batch = self._client.next_batch(step, version, self._engines, timeout_s=STEP_S).content
        wall_s = time.monotonic() - start
        expected = self.config.rollout.prompts_per_step * self.config.rollout.num_replies
        if len(batch.samples) != expected:
            raise RunError(f"the driver delivered {len(batch.samples)} samples of {expected} in step {step}")
        return batch, wall_s

    def cpu_s(self) -> float:
        """CPU seconds of all shards since they were started."""
        times = [psutil.Process(child.process.pid).cpu_times() for child in self.children]
        return sum(spent.user + spent.system for spent in times)

    def rss_mb(self) -> float:
        """Resident memory of all shards."""
        return sum(psutil.Process(child.process.pid).memory_info().rss for child in self.children) / 1e6
