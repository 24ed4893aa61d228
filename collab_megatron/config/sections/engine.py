"""The sections of the SGLang servers and of the weight sync."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from collab_megatron.config.sections.addresses import check_host
from collab_megatron.config.sections.base import Count, Named, Positive, Seconds, Section


class EngineSection(Section):
    """The SGLang servers: started by the run, or given as URLs."""

    count: Positive = 1  # servers to start, each with its own copy of the model
    urls: tuple[str, ...] = ()  # running SGLang servers; empty: start `count` servers
    placement: Literal["disaggregated", "colocated"] = "disaggregated"  # on their own GPUs, or on the trainer's
    python: str | None = None  # Python interpreter of the engines' environment; None: this one
    host: str = "127.0.0.1"  # address of this machine that the servers listen on
    port: Annotated[int, Field(ge=0, le=65535)] = 0  # of the first server; the next ones follow; 0: free ports
    tensor: Positive = 1  # tensor-parallel ranks of each server
    max_total_tokens: Positive | None = None  # KV-cache tokens; None: SGLang decides
    max_running_requests: Positive | None = None  # requests in one batch of a server; None: SGLang decides
    # share of GPU memory for weights and KV cache; None: SGLang decides, and for colocated engines what the trainer's
    # memory leaves (--dry-run prints it)
    mem_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    context_length: Positive | None = None  # tokens of prompt and reply; None: the model's
    # additional flags of sglang.launch_server, except flags that keys of this config set
    extra_args: tuple[Named, ...] = ()
    # a server must answer within this time after its start. A run with no server left waits 3 times as long for one,
    # then saves and stops
    startup_timeout_s: Seconds = 300.0
    # a server is given up after this long without an answer, and after this long without a finished batch while it has
    # requests and is not paused (on CPU, where one prefill can take a minute: 6 times as long)
    health_timeout_s: Seconds = 20.0
    # of each server that the run started; the count starts over when it has lived for half an hour. Then the run
    # goes on without it
    max_restarts: Count = 3
    max_concurrency: Positive = 256  # generate requests in flight, per server
    max_running_tokens: Positive | None = None  # tokens of the requests in flight, per server; None: size of its cache
    # CPU threads of each rank. None: all cores; with
    # driver.max_staleness > 0 a share, because the trainer runs at the same time
    threads: Positive | None = None

    @field_validator("host")
    @classmethod
    def _host(cls, value: str) -> str:
        return check_host(value)

    @field_validator("extra_args")
    @classmethod
    def _not_ours(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """The run generates API keys, passes them in a file, and sends them."""
        for flag in (word.partition("=")[0] for word in value):
            if flag in ("--api-key", "--admin-api-key", "--config"):
                raise ValueError(f"{flag} is set by every run: leave it out, and write the flags of a config file here")
        return value

    @property
    def servers(self) -> int:
        """Number of servers, started or given."""
        return len(self.urls) or self.count

    @property
    def wait_s(self) -> float:
        """With no server left, how long the run waits for one: two failed starts and a good one."""
        return 3 * self.startup_timeout_s

    def work_timeout_on(self, device: str) -> float:
        """Seconds without a finished batch after which a server on `device` (cpu | cuda) is given up."""
        return {"cuda": 1.0, "cpu": 6.0}[device] * self.health_timeout_s


class SyncSection(Section):
    """Weight sync from trainer to engines."""

    # broadcast: a process group of trainer and engines; ipc: memory handles on one machine; disk: a folder that both
    # can read. auto: ipc for colocated engines, else broadcast
    transport: Literal["auto", "broadcast", "ipc", "disk"] = "auto"
    # size limit of a bucket of weights; a larger tensor has its own bucket. Two buckets exist at a time. None: 512 on
    # GPUs, 128 on CPU
    bucket_mb: Annotated[float, Field(gt=0)] | None = None
    # generations in flight keep their cache (in_place), compute it again (retract), or are lost (abort)
    pause: Literal["in_place", "retract", "abort"] = "in_place"
    timeout_s: Seconds = 300.0  # deadline of every request and every collective of a sync
    disk_dir: Path | None = None  # folder of the disk transport; None: RUN_DIR/weights/NAME
    # compare checksums of all tensors at the first and every n-th sync, of 1/n of them at the others; 0: never
    verify_every: Count = 10
    # mean |trainer - engine| log-prob of the probe above which the run stops
    max_probe_gap: float = Field(default=0.1, gt=0)
    # the same for a step's tokens that the newest weights sampled. With driver.max_staleness only in steps whose sync
    # found no request in flight (sync/flushed on the dashboard), because others may use a prefix cache of older weights
    max_logprob_gap: float = Field(default=0.5, gt=0)

    def transport_for(self, placement: str) -> Literal["broadcast", "ipc", "disk"]:
        """The transport, with `auto` decided for that `placement`."""
        if self.transport == "auto":
            return "ipc" if placement == "colocated" else "broadcast"
        return self.transport

    def bucket_mb_on(self, device: str) -> float:
        """MB of a bucket with the trainer on `device` (cpu | cuda)."""
        return self.bucket_mb or {"cuda": 512, "cpu": 128}[device]
