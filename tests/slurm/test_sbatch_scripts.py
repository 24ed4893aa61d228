"""slurm/*.sbatch under a real Slurm: arguments, log, exit code, TERM, requeue.

A stand-in package with the entry points' names shows what the scripts pass on; the last test uses the real ones.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import SlurmCluster, poll

pytestmark = pytest.mark.slurm
REPOSITORY = Path(__file__).parents[2]
KINDS = ("rl", "sft", "dpo")
PYTHON = {"COLLAB_PYTHON": sys.executable}

STAND_IN = """
import os, signal, sys, time

def leave(*_):
    print("saw TERM", flush=True)
    sys.exit(130 if "save" in sys.argv else 7)

signal.signal(signal.SIGTERM, leave)
print("arguments", sys.argv[1:], "restart", os.environ.get("SLURM_RESTART_COUNT", "0"), flush=True)
if {"wait", "save"} & set(sys.argv):
    time.sleep(100)
sys.exit(5 if "fail" in sys.argv else 0)
"""


@pytest.fixture
def submit_folder(tmp_path: Path) -> Path:
    """A repository root with the real scripts and stand-ins for the entry points."""
    shutil.copytree(REPOSITORY / "slurm", tmp_path / "slurm")
    shutil.copytree(REPOSITORY / "runs" / "slurm", tmp_path / "runs" / "slurm", ignore=shutil.ignore_patterns("*.log"))
    package = tmp_path / "collab_megatron"
    package.mkdir()
    (package / "__init__.py").touch()
    for kind in KINDS:
        (package / f"train_{kind}.py").write_text(STAND_IN)
    return tmp_path


def log_of(folder: Path, kind: str, job_id: int) -> str:
    log = folder / "runs" / "slurm" / f"train_{kind}-{job_id}.log"
    return log.read_text() if log.exists() else ""  # a job runs a moment before its log is there


def wait_for_line(folder: Path, job_id: int, line: str) -> None:
    poll(lambda: line in log_of(folder, "rl", job_id) or None, 30, lambda: log_of(folder, "rl", job_id))


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_and_exit_code_pass_through(slurm_cluster: SlurmCluster, submit_folder: Path, kind: str) -> None:
    arguments = ["conf/x.yaml", "run.steps=3", "a.b=two words"]
    added = {"ok": ["run.resume=auto"], "fail": ["run.resume=auto"], "run.resume=false": []}
    jobs = {
        extra: slurm_cluster.sbatch(f"slurm/train_{kind}.sbatch", *arguments, extra, cwd=submit_folder, env=PYTHON)
        for extra in added
    }
    ends = {extra: slurm_cluster.wait(job_id) for extra, job_id in jobs.items()}
    for extra, job_id in jobs.items():
        assert f"arguments {[*arguments, extra, *added[extra]]} restart 0" in log_of(submit_folder, kind, job_id)
    assert (ends["ok"].state, ends["ok"].exit_code) == ("COMPLETED", 0)
    assert (ends["fail"].state, ends["fail"].exit_code) == ("FAILED", 5)


def test_term_reaches_the_training_process(slurm_cluster: SlurmCluster, submit_folder: Path) -> None:
    job_id = slurm_cluster.sbatch("slurm/train_rl.sbatch", "wait", cwd=submit_folder, env=PYTHON)
    slurm_cluster.wait(job_id, "RUNNING")
    wait_for_line(submit_folder, job_id, "arguments")
    slurm_cluster.slurm("scancel", str(job_id))
    assert slurm_cluster.wait(job_id).state == "CANCELLED"
    wait_for_line(submit_folder, job_id, "saw TERM")


def test_a_requeued_job_goes_on_in_its_log(slurm_cluster: SlurmCluster, submit_folder: Path) -> None:
    job_id = slurm_cluster.sbatch("--requeue", "slurm/train_rl.sbatch", "wait", cwd=submit_folder, env=PYTHON)
    slurm_cluster.wait(job_id, "RUNNING")
    wait_for_line(submit_folder, job_id, "restart 0")
    slurm_cluster.slurm("scontrol", "requeue", str(job_id))
    wait_for_line(submit_folder, job_id, "restart 1")
    assert "restart 0" in log_of(submit_folder, "rl", job_id)
    assert slurm_cluster.job(job_id).restarts == 1
    slurm_cluster.slurm("scancel", str(job_id))
    slurm_cluster.wait(job_id)


def test_a_job_near_its_time_limit_saves_and_is_queued_again(slurm_cluster: SlurmCluster, submit_folder: Path) -> None:
    """The signal that --signal=B:USR1@180 sends, at once."""
    env = {**PYTHON, "COLLAB_LEAST_S": "0"}
    job_id = slurm_cluster.sbatch("slurm/train_rl.sbatch", "save", cwd=submit_folder, env=env)
    slurm_cluster.wait(job_id, "RUNNING")
    wait_for_line(submit_folder, job_id, "restart 0")
    slurm_cluster.slurm("scancel", "--signal=USR1", "--batch", str(job_id))
    wait_for_line(submit_folder, job_id, "has saved and is queued again")
    wait_for_line(submit_folder, job_id, "restart 1")
    assert slurm_cluster.job(job_id).restarts == 1
    slurm_cluster.slurm("scancel", str(job_id))
    assert slurm_cluster.wait(job_id).state == "CANCELLED"


def test_a_missing_environment_is_one_sentence(slurm_cluster: SlurmCluster, submit_folder: Path) -> None:
    job_id = slurm_cluster.sbatch("slurm/train_rl.sbatch", "x", cwd=submit_folder, env={"COLLAB_PYTHON": "no/python"})
    assert slurm_cluster.wait(job_id).exit_code == 2
    assert log_of(submit_folder, "rl", job_id).startswith("error: no interpreter at no/python: run make install")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_config_that_does_not_exist_is_one_sentence_and_exit_code_2(slurm_cluster: SlurmCluster, kind: str) -> None:
    job_id = slurm_cluster.sbatch(f"slurm/train_{kind}.sbatch", "conf/absent.yaml", cwd=REPOSITORY, env=PYTHON)
    end = slurm_cluster.wait(job_id, timeout_s=200)
    log = REPOSITORY / "runs" / "slurm" / f"train_{kind}-{job_id}.log"
    text = log.read_text()
    assert end.exit_code == 2, text
    assert "absent.yaml" in text
    assert "Traceback" not in text
    assert [line for line in text.splitlines() if line.startswith("error: ")]
    log.unlink()
