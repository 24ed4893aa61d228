"""`sbatch slurm/train_rl.sbatch conf/demo_rl.yaml`: the same RL as a job of a real one-node Slurm."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from collab_megatron.wire.checkpoints import newest_complete
from tests.conftest import DESK_KEY, REPOSITORY
from tests.slurm.cluster import SlurmCluster

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.full, pytest.mark.timeout(300)]


def test_a_job_trains_and_ends_with_zero(
    rl_command: Callable[..., list[str]], slurm_cluster: SlurmCluster, tmp_path: Path
) -> None:
    _, _, *arguments = rl_command(tmp_path / "run", "train.steps=2", "engine.urls=[]")
    env = {"COLLAB_PYTHON": sys.executable, "DESK_API_KEY": DESK_KEY}
    job_id = slurm_cluster.sbatch("slurm/train_rl.sbatch", *arguments, cwd=REPOSITORY, env=env)
    end = slurm_cluster.wait(job_id, timeout_s=240)
    log = REPOSITORY / "runs" / "slurm" / f"train_rl-{job_id}.log"
    text = log.read_text()
    assert (end.state, end.exit_code) == ("COMPLETED", 0), text[-4000:]
    assert "rl 2/2" in text
    assert newest_complete(tmp_path / "run" / "checkpoints" / "rl") is not None
    assert DESK_KEY not in text
    log.unlink()
