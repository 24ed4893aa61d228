"""slurm/check_nodes.sbatch under a real Slurm of two nodes: srun starts the agents, the launcher hears them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from collab_megatron import __version__
from tests.conftest import REPOSITORY
from tests.slurm.cluster import SlurmCluster, SlurmJob, poll

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(400)]
END_S = 300.0  # torch is imported on each node


@pytest.fixture
def submit_folder(tmp_path: Path) -> Path:
    """A repository root with the real scripts and links to the code."""
    shutil.copytree(REPOSITORY / "slurm", tmp_path / "slurm")
    (tmp_path / "runs" / "slurm").mkdir(parents=True)
    for name in ("collab_megatron", "tools"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    return tmp_path


def submit(cluster: SlurmCluster, folder: Path, *arguments: str) -> tuple[int, Path]:
    env = {"COLLAB_PYTHON": sys.executable, "PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    job_id = cluster.sbatch(*arguments, cwd=folder, env=env)
    return job_id, folder / "runs" / "slurm" / f"check_nodes-{job_id}.log"


def ended(cluster: SlurmCluster, job_id: int) -> SlurmJob:
    return cluster.wait(job_id, timeout_s=END_S)


def test_nodes_that_are_alike_pass(slurm_cluster: SlurmCluster, submit_folder: Path) -> None:
    job_id, log = submit(slurm_cluster, submit_folder, "--nodes=2", "slurm/check_nodes.sbatch")
    end = ended(slurm_cluster, job_id)
    text = log.read_text()
    assert (end.state, end.exit_code) == ("COMPLETED", 0), text
    for node in ("node1", "node2"):
        (line,) = (line for line in text.splitlines() if line.startswith(f"{node} "))
        assert "torch " in line
        assert f"0 GPUs, version {__version__}  sees the folder" in line
        assert (submit_folder / "runs" / "slurm" / "check_nodes" / node / "probe.log").exists()
    assert "2 nodes are alike and share runs/slurm" in text
    assert not list((submit_folder / "runs" / "slurm").glob(".check_nodes*"))


def test_a_job_that_is_cancelled_leaves_no_agent(slurm_cluster: SlurmCluster, submit_folder: Path) -> None:
    """Nodes that are not of the job: the check waits for them until it is cancelled."""
    job_id, log = submit(slurm_cluster, submit_folder, "--nodes=2", "slurm/check_nodes.sbatch", "--nodes=node[1-3]")
    agents = "collab_megatron.launch.agent --launcher"
    poll(lambda: len(_with(agents, submit_folder)) == 2 or None, 120, lambda: log.read_text())
    for process in _with(agents, submit_folder) + _with("check_nodes.py", submit_folder):
        arguments, environment = ((process / name).read_bytes() for name in ("cmdline", "environ"))
        assert b"JOB_KEY" not in environment  # the key is on standard input only
        assert not any(len(word) == 64 for word in arguments.split(b"\0"))
    slurm_cluster.slurm("scancel", str(job_id))
    assert slurm_cluster.wait(job_id).state == "CANCELLED"
    poll(lambda: _with(agents, submit_folder) == [] or None, 60, lambda: log.read_text())


def _with(words: str, folder: Path) -> list[Path]:
    """Processes in /proc with these words in their command line and this working folder; not srun and bash."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            here = (process / "cwd").resolve() == folder.resolve()
        except OSError:
            continue  # it has just ended
        if here and words in line and line.startswith(sys.executable):
            found.append(process)
    return found
