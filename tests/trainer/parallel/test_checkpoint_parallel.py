"""Checkpoints on real gloo ranks: bit-exact resume, every other layout, async saves, full disks, hostile files."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from collab_megatron.wire.checkpoints import complete_checkpoints, retire
from tests.trainer.parallel.ranks import RanksFailed, run_ranks
from tests.trainer.parallel.tiny import make_model

SCRIPT = Path(__file__).parent / "checkpoint_ranks.py"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("checkpoints")
    # two pipeline stages, of two chunks each where stages are interleaved; experts, many small tensors, never are
    for kind, layers in (("qwen3", 4), ("qwen3moe", 2)):
        make_model(work / kind, kind, num_hidden_layers=layers)
        make_model(work / f"{kind}-bf16", kind, dtype=torch.bfloat16, num_hidden_layers=layers)
    return work


@pytest.mark.slow
def test_every_layout_resumes_bit_for_bit_and_takes_over_another(work: Path, tmp_path: Path) -> None:
    """TP, PP, interleaved, DP, EP, the distributed optimizer, offload; all in one set of processes."""
    _layouts(work, tmp_path, 1)


@pytest.mark.slow
@pytest.mark.full
def test_every_layout_resumes_bit_for_bit_and_takes_over_every_other(work: Path, tmp_path: Path) -> None:
    """64 checks."""
    _layouts(work, tmp_path, 9)


def _layouts(models: Path, work: Path, how_many: int) -> None:
    for model in models.iterdir():
        (work / model.name).symlink_to(model)
    run_ranks(SCRIPT, 2, "layouts", str(work), str(how_many), deadline_s=480)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 8 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True, text=True, timeout=30
    )
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True, timeout=30)


@pytest.mark.slow
def test_full_disks_leave_earlier_checkpoints_whole_and_async_saves_are_the_same_saves(
    work: Path, small_disk: Path
) -> None:
    run_ranks(SCRIPT, 2, "disk", str(work), str(small_disk))


@pytest.mark.slow
def test_hostile_files_are_refused_and_a_killed_save_is_never_chosen(work: Path) -> None:
    with pytest.raises(RanksFailed, match=r"(?m)^hostile: refused$"):  # and then killed
        run_ranks(SCRIPT, 1, "alone", str(work))
    directory = work / "killed"
    assert sorted(f.name for f in directory.iterdir()) == ["step_00000001", "step_00000002.tmp"]
    assert (directory / "step_00000002.tmp" / "model" / ".metadata").is_file()  # all there but the marker
    assert [f.name for f in complete_checkpoints(directory)] == ["step_00000001"]
    retire(directory, keep_last=1)
    assert [f.name for f in directory.iterdir()] == ["step_00000001"]
