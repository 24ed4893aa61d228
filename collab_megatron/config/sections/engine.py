"""The sections of the SGLang servers and of the weights they are sent."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from collab_megatron.config.sections.addresses import check_host
from collab_megatron.config.sections.base import Count, Named, Positive, Seconds, Section


class EngineSection(Section):
    """The SGLang servers: started by us, or given as URLs."""

    count: Positive = 1  # servers to start, each with its own copy of the model
    urls: tuple[str, ...] = ()  # SGLang servers that run already; empty: start `count` of them
    placement: Literal["disaggregated", "colocated"] = "disaggregated"  # on GPUs of their own, or on the trainer's
    python: str | None = None  # interpreter of the engines' own environment; None: ours
    host: str = "127.0.0.1"  # address of this machine that the servers listen on
    port: Annotated[int, Field(ge=0, le=65535)] = 0  # of the first server, the others follow; 0: free ones
    tensor: Positive = 1  # tensor-parallel ranks of each server
    max_total_tokens: Positive | None = None  # KV-cache tokens; None: SGLang decides
    max_running_requests: Positive | None = None
    mem_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    context_length: Positive | None = None
    # further flags of sglang.launch_server; not those that keys of this config set
    extra_args: tuple[Named, ...] = ()
    # a server must answer within this time after its start. A run with no server left waits 3 times as long for one,
    # then saves and stops
    startup_timeout_s: Seconds = 300.0
    # a server is given up after this long without an answer, and after this long without a finished batch while it has
    # requests and is not paused (on CPU, where one prefill can take a minute: 6 times as long)
    health_timeout_s: Seconds = 20.0
    max_restarts: Count = 3  # of each server that the run started; then the run goes on without it
    max_concurrency: Positive = 256  # generate calls in flight, per server
    max_running_tokens: Positive | None = None  # tokens of the calls in flight, per server; None: what its cache holds
    # CPU threads of each rank. None: all cores while the trainer waits; shared with it where driver.max_staleness > 0
    threads: Positive | None = None

    @field_validator("host")
    @classmethod
    def _host(cls, value: str) -> str:
        return check_host(value)

    @field_validator("extra_args")
    @classmethod
    def _not_ours(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """The run makes keys of its own, hands them over in a file, and sends them."""
        for flag in (word.partition("=")[0] for word in value):
            if flag in ("--api-key", "--admin-api-key", "--config"):
                raise ValueError(
                    f"{flag} is what every run sets itself: leave it out, and write the flags of a file here"
                )
        return value

    @property
    def servers(self) -> int:
        """Servers of the run, started or given."""
        return len(self.urls) or self.count

    @property
    def wait_s(self) -> float:
        """With no server left, how long the run waits for one: two failed starts and a good one."""
        return 3 * self.startup_timeout_s

    def work_timeout_on(self, device: str) -> float:
        """Seconds without a finished batch after which a server on `device` (cpu | cuda) is given up."""
        return {"cuda": 1.0, "cpu": 6.0}[device] * self.health_timeout_s


class SyncSection(Section):
    """Weights from trainer to engines."""

    # broadcast: a process group of trainer and engines; ipc: handles to memory of one machine; disk: a folder that both
    # can read. auto: ipc for colocated engines, else broadcast
    transport: Literal["auto", "broadcast", "ipc", "disk"] = "auto"
    # weights travel in buckets of at most this size, larger tensors alone; two buckets exist at a time. None: 512 on
    # GPUs, 128 on CPU
    bucket_mb: Annotated[float, Field(gt=0)] | None = None
    # generations in flight go on with the cache they have (in_place) or one made again (retract), or are lost (abort)
    pause: Literal["in_place", "retract", "abort"] = "in_place"
    timeout_s: Seconds = 300.0  # deadline of every call and every collective of a sync
    disk_dir: Path | None = None  # where the disk transport writes; None: RUN_DIR/weights/NAME
    # checksums of all tensors at the first sync and at every n-th, of an n-th part at the others; 0: none at all
    verify_every: Count = 10
    max_probe_gap: float = Field(default=0.1, gt=0)  # mean |trainer - engine| log-prob of the probe that stops the run
    # the same of a step's replies that the newest weights sampled; with driver.max_staleness only of steps whose sync
    # found no request in flight (sync/flushed on the dashboard): others may rest on a prefix cache of older weights
    max_logprob_gap: float = Field(default=0.5, gt=0)

    def transport_for(self, placement: str) -> Literal["broadcast", "ipc", "disk"]:
        """What `auto` comes to for engines of that `placement`."""
        if self.transport == "auto":
            return "ipc" if placement == "colocated" else "broadcast"
        return self.transport

    def bucket_mb_on(self, device: str) -> float:
        """MB of a bucket where the trainer runs on `device` (cpu | cuda)."""
        return self.bucket_mb or {"cuda": 512, "cpu": 128}[device]
