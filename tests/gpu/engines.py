"""A real SGLang server of a tiny bf16 model on a GPU, and the trainer ranks that send it weights."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from collab_megatron.config.sections import EngineSection
from collab_megatron.engine.control import EngineControl
from collab_megatron.engine.server_args import engine_command, nccl_settings
from collab_megatron.launch.node import visible_gpus
from collab_megatron.launch.ports import free_port
from collab_megatron.wire.roster import EngineEntry, RosterFolder
from tests.engine.real_servers import end_at_once, server_supervisor
from tests.gpu.device import DEVICE, ENGINE_ARGS, PART_S
from tests.trainer.parallel.ranks import run_ranks
from tests.trainer.parallel.tiny import make_model

START_S = min(200.0, PART_S - 40.0)  # a GPU's first start compiles kernels
NO_GRAPHS = ("--disable-cuda-graph",) if DEVICE == "cuda" else ()  # whose capture would take some of that time
CACHE_TOKENS = {"cpu": 8192, "cuda": 2**20}  # on a GPU large enough that its release shows
CACHE_BYTES_PER_TOKEN = 4 * 2 * 2 * 64 * 2  # layers, key and value, heads, head size, bytes
Placement = Literal["disaggregated", "colocated"]


@dataclass(frozen=True)
class GpuServer:
    """A running server."""

    url: str
    pid: int
    folder: Path  # the weights that it was started with
    placement: Placement

    def control(self) -> EngineControl:
        return EngineControl(self.url, timeout_s=120)


@contextmanager
def running(root: Path, placement: Placement) -> Iterator[GpuServer]:
    """On the first GPU if colocated, else on the second."""
    # heads of 64 elements: all attention kernels of SGLang take them
    folder = make_model(root / "model", "llama", torch.bfloat16, hidden_size=256, num_hidden_layers=4)
    section = EngineSection(
        placement=placement,
        max_total_tokens=CACHE_TOKENS[DEVICE],
        max_running_requests=16,
        mem_fraction=0.3 if DEVICE == "cuda" else 0.5,
        extra_args=(*ENGINE_ARGS, *NO_GRAPHS),
    )
    command = engine_command(section, model_path=str(folder), dtype="bfloat16", device=DEVICE, port=free_port(), seed=1)
    env = dict(command.env)
    if DEVICE == "cuda":
        env["CUDA_VISIBLE_DEVICES"] = visible_gpus()[0 if placement == "colocated" else 1]
    supervisor = server_supervisor(root / "logs").__enter__()  # left in end_at_once
    try:
        child = supervisor.start("engine-0", command.argv, env)
        control = EngineControl(command.url, timeout_s=120)
        control.wait_until_ready(timeout_s=START_S, alive=lambda: child.process.poll() is None)
        control.close()
        yield GpuServer(command.url, child.process.pid, folder, placement)
    finally:
        end_at_once(supervisor)


def write_job(server: GpuServer, work: Path, **sync: Any) -> Path:
    """The job of a rank script that publishes to `server` with the settings `sync`."""
    # not managed: nobody would restart it
    RosterFolder(work / "roster").publish([EngineEntry("engine-0", server.url, 1, managed=False)], coming=0)
    job = {
        "model": str(server.folder),
        "dtype": "bfloat16",
        "device": DEVICE,
        "roster": str(work / "roster"),
        "out": str(work),
        "parallel": {},
        "sync": sync,
        "engine": {"placement": server.placement},
        "server_pid": server.pid,
    }
    (work / "job.json").write_text(json.dumps(job))
    return work / "job.json"


def run_rank(script: Path, job: Path, *arguments: str) -> None:
    """One trainer rank, with NCCL set as the launcher sets it: as the server has it."""
    with pytest.MonkeyPatch.context() as environment:
        if DEVICE == "cuda":
            for name, value in nccl_settings(ENGINE_ARGS, os.environ).items():
                environment.setenv(name, value)
        run_ranks(script, 1, str(job), *arguments)


def publish_eleven_versions(script: Path, server: GpuServer, work: Path, transport: str) -> list[dict[str, Any]]:
    """The rows of tests/trainer/sync/sync_ranks.py, checked: every version is served, with the trainer's weights."""
    # ten scalings make the logits so steep that bf16 alone moves log-probs by 0.11; the checksums are exact
    job = write_job(server, work, transport=transport, verify_every=1, bucket_mb=0.25, max_probe_gap=0.3)
    run_rank(script, job)
    rows: list[dict[str, Any]] = json.loads((work / "replies.json").read_text())
    assert len(rows) == 3
    for row in rows:
        assert row["served"] == str(row["version"])
        assert row["checked"] == rows[0]["checked"] > 0  # the checksums of all tensors, each time
    assert rows[0]["replies"] != rows[-1]["replies"], "the change of weights must show"
    return rows
