"""slurm/job.sh with a stand-in for scontrol: which signals reach the program, and when a job is queued again. Needs no
Slurm; test_sbatch_scripts.py has the real one."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = sorted((REPOSITORY / "slurm").glob("*.sbatch"))
PROGRAM = """
trap 'echo got TERM; exit "$AT_TERM"' TERM
echo up
for tenth in $(seq "$TENTHS"); do sleep 0.1; done
exit 5
"""
QUEUED = "has saved and is queued again\nscontrol requeue 7\n"


def run(folder: Path, number: signal.Signals | None, **env: str) -> tuple[int, str]:
    """(exit code, output) of a job whose shell gets the signal once its program runs."""
    (folder / "bin").mkdir()
    (folder / "bin" / "scontrol").write_text('#!/bin/sh\necho scontrol "$@"\n')
    (folder / "bin" / "scontrol").chmod(0o755)
    (folder / "program.sh").write_text(PROGRAM)
    place = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "COLLAB_LEAST_S": "0"}
    log = folder / "log"
    with log.open("w") as sink:
        shell = subprocess.Popen(
            ["bash", "-c", f"set -euo pipefail; source {REPOSITORY}/slurm/job.sh; run_job bash {folder}/program.sh"],
            env={**place, "AT_TERM": "130", "TENTHS": "300", **env},
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
        try:
            deadline = time.monotonic() + 20
            while "up" not in log.read_text():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            if number is not None:
                shell.send_signal(number)
            code = shell.wait(timeout=40)
        finally:
            shell.kill()
    return code, log.read_text()


def test_the_exit_code_is_that_of_the_program(tmp_path: Path) -> None:
    assert run(tmp_path, None, TENTHS="1") == (5, "up\n")


def test_near_the_time_limit_the_program_saves_and_the_job_is_queued_again(tmp_path: Path) -> None:
    code, said = run(tmp_path, signal.SIGUSR1)
    assert code == 130
    assert "got TERM" in said
    assert said.endswith(QUEUED)


def test_the_program_has_the_standard_input_of_the_job(tmp_path: Path) -> None:
    command = f"set -euo pipefail; source {REPOSITORY}/slurm/job.sh; run_job cat <<<'the key'"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "the key\n"


def test_a_cancelled_job_saves_and_ends(tmp_path: Path) -> None:
    assert run(tmp_path, signal.SIGTERM) == (130, "up\ngot TERM\n")


@pytest.mark.parametrize("code", [0, 1, 2, 3])
def test_a_program_that_is_done_or_has_failed_is_not_queued_again(tmp_path: Path, code: int) -> None:
    assert run(tmp_path, signal.SIGUSR1, AT_TERM=str(code)) == (code, "up\ngot TERM\n")


def test_a_limit_that_is_too_short_for_any_progress_ends_the_chain(tmp_path: Path) -> None:
    code, said = run(tmp_path, signal.SIGUSR1, COLLAB_LEAST_S="60")
    assert code == 130
    assert "error: job 7 is not queued again, because it ran for" in said
    assert "scontrol" not in said


def test_without_slurm_nothing_is_queued(tmp_path: Path) -> None:
    assert run(tmp_path, signal.SIGUSR1, SLURM_JOB_ID="") == (130, "up\ngot TERM\n")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_every_script_is_short_and_runs_its_program_through_it(script: Path) -> None:
    text = script.read_text()
    assert len(text.splitlines()) < 80
    assert "source slurm/env.sh\nsource slurm/job.sh\n" in text
    trains = script.name.startswith("train_")
    assert text.splitlines()[-1].startswith(f'{"run_on_all_nodes" if trains else "run_job"} "${{COLLAB_RUN[@]}}" ')
    assert ("source slurm/nodes.sh\n" in text) == (trains or script.name == "check_nodes.sbatch")
    assert ("#SBATCH --requeue" in text) == (script.name != "check_nodes.sbatch")  # which takes half a minute
    saves = script.name not in ("convert.sbatch", "check_nodes.sbatch")
    assert ("#SBATCH --signal=B:USR1@180" in text) == saves
