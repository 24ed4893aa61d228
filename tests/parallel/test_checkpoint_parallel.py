"""Checkpoints on real gloo ranks: bit-exact resume, other layouts, a disk that fills up."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.parallel.ranks import run_ranks
from tests.parallel.tiny import make_model

SCRIPT = Path(__file__).parent / "checkpoint_ranks.py"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("checkpoints")
    make_model(work / "qwen3", "qwen3")
    make_model(work / "qwen3-bf16", "qwen3", dtype=torch.bfloat16)
    return work


@pytest.fixture(scope="module")
def tp2(work: Path) -> str:
    run_ranks(SCRIPT, 2, "resume", str(work), "2", "1", "0", "float32", "tp2")
    return "tp2"


@pytest.fixture(scope="module")
def dp2(work: Path, tp2: str) -> str:
    run_ranks(SCRIPT, 2, "resume", str(work), "1", "2", "1", "float32", "dp2", tp2)
    return "dp2"


@pytest.mark.slow
def test_tp2_resumes_bit_for_bit(tp2: str) -> None:
    assert tp2


@pytest.mark.slow
def test_dp2_with_the_distributed_optimizer_resumes_bit_for_bit_and_takes_over_tp2(dp2: str) -> None:
    assert dp2


@pytest.mark.slow
def test_tp1_resumes_bit_for_bit_and_takes_over_tp2_and_dp2(work: Path, tp2: str, dp2: str) -> None:
    run_ranks(SCRIPT, 1, "resume", str(work), "1", "1", "0", "float32", "tp1", tp2, dp2)


@pytest.mark.slow
def test_bf16_resumes_bit_for_bit(work: Path) -> None:
    run_ranks(SCRIPT, 1, "resume", str(work), "1", "1", "0", "bfloat16", "tp1-bf16")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True, text=True, timeout=30
    )
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True, timeout=30)


@pytest.mark.slow
def test_full_disk_leaves_earlier_checkpoints_whole(work: Path, small_disk: Path) -> None:
    run_ranks(SCRIPT, 2, "full", str(work), str(small_disk))
