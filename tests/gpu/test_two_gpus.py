"""Trainer and engine on a GPU each: weights by broadcast over NCCL, and an engine that dies while it receives them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gpu import killed_engine_ranks
from tests.gpu.device import ON_DEVICE, need_gpus
from tests.gpu.engines import GpuServer, publish_eleven_versions, run_rank, running, write_job
from tests.trainer.sync import sync_ranks

pytestmark = ON_DEVICE

CALL_S = 20.0  # deadline of a call and of a collective
NOTICED_S = 150.0  # from the kill to the error: a collective's deadline, the ends of both groups, the wait for servers


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GpuServer]:
    need_gpus(2)
    with running(tmp_path_factory.mktemp("engine"), "disaggregated") as started:
        yield started


def test_eleven_syncs_by_broadcast(server: GpuServer, tmp_path: Path) -> None:
    publish_eleven_versions(Path(sync_ranks.__file__), server, tmp_path, "broadcast")


@pytest.mark.parametrize("sync", [0, 1], ids=["first", "second"])
def test_an_engine_killed_during_a_broadcast_is_noticed(server: GpuServer, tmp_path: Path, sync: int) -> None:
    """In the first sync, whose group is new, and in a later one."""
    job = write_job(server, tmp_path, transport="broadcast", timeout_s=CALL_S, bucket_mb=0.25)
    run_rank(Path(killed_engine_ranks.__file__), job, str(sync))
    said = json.loads((tmp_path / "said.json").read_text())
    assert said["error"] == "NoEngineLeft", said
    assert said["seconds"] < NOTICED_S
