"""An SGLang server on the trainer's GPU: start, weights over CUDA IPC, memory released and resumed ten times."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.gpu.device import DEVICE, ON_DEVICE
from tests.gpu.engines import CACHE_BYTES_PER_TOKEN, CACHE_TOKENS, GpuServer, publish_eleven_versions, running
from tests.trainer.parallel.plain import load_plain, statistics
from tests.trainer.sync import sync_ranks

pytestmark = ON_DEVICE

BF16_BOUND = 0.1  # mean difference of a log-probability
PROMPT = list(range(5, 45))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GpuServer]:
    with running(tmp_path_factory.mktemp("engine"), "colocated") as started:
        yield started


def test_a_started_server_has_the_log_probs_of_transformers(server: GpuServer) -> None:
    control = server.control()
    found = control.prompt_logprobs(PROMPT, cache_key="first")
    control.close()
    with torch.no_grad():
        wanted = statistics(load_plain(server.folder), torch.tensor([PROMPT]))[0][0, 1:]
    assert (torch.tensor(found) - wanted).abs().mean() < BF16_BOUND


@pytest.mark.parametrize("transport", ["ipc", "disk"])
def test_eleven_syncs_with_checksums_between_ten_releases_of_memory(
    server: GpuServer, tmp_path: Path, transport: str
) -> None:
    publish_eleven_versions(Path(sync_ranks.__file__), server, tmp_path, transport)
    freed = json.loads((tmp_path / "freed.json").read_text())
    assert len(freed) == 10
    if DEVICE == "cuda":
        cache = CACHE_TOKENS[DEVICE] * CACHE_BYTES_PER_TOKEN
        assert min(freed) > 0.9 * cache, f"a release freed {min(freed):,} bytes, the KV cache alone has {cache:,}"
