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


@pytest.mark.slow
def test_resume_is_bit_exact_and_other_layouts_take_over(work: Path) -> None:
    """TP2 and DP2 with the distributed optimizer resume bit for bit; TP1 then takes both over; bf16 on its own."""
    run_ranks(SCRIPT, 2, "resume", str(work), "2", "1", "0", "float32", "tp2")
    run_ranks(SCRIPT, 2, "resume", str(work), "1", "2", "1", "float32", "dp2", "tp2")
    run_ranks(SCRIPT, 1, "resume", str(work), "1", "1", "0", "float32", "tp1", "tp2", "dp2")
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
