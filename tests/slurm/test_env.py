"""slurm/env.sh: the command of a job with .venv, with an Apptainer and with an enroot image. Needs no Slurm."""

from __future__ import annotations

import itertools
import os
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
HOSTS = dict.fromkeys(("CUDA_HOME", "CUDA_PATH", "CUDA_ROOT", "CPATH", "LIBRARY_PATH", "CC", "CXX"), "/host")
IN_IMAGE = "/opt/collab_megatron/.venv/bin/python"


def run(folder: Path, script: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A job's shell in `folder` after it has sourced env.sh."""
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail; {env.pop('SETUP', ':')}; source {REPOSITORY}/slurm/env.sh; {script}"],
        cwd=folder,
        env={"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "HOME": str(folder), **env},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def command(folder: Path, **env: str) -> list[str]:
    done = run(folder, 'printf "%s\\n" "${COLLAB_RUN[@]}"', **env)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def program(file: Path, script: str = "exit 0") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return file


def image(folder: Path, kind: str) -> str:
    (folder / f"x.{kind}").touch()
    program(folder / "bin" / {"sif": "apptainer", "sqsh": "enroot"}[kind])
    return str(folder / f"x.{kind}")


def test_the_environment_of_make_install(tmp_path: Path) -> None:
    done = run(tmp_path, "true")
    assert (done.returncode, done.stderr.startswith("error: no interpreter at")) == (2, True)
    program(tmp_path / ".venv" / "bin" / "python")
    assert command(tmp_path) == [f"{tmp_path}/.venv/bin/python"]
    other = program(tmp_path / "other")
    assert command(tmp_path, COLLAB_PYTHON=str(other)) == [str(other)]


def test_an_apptainer_image(tmp_path: Path) -> None:
    found = command(tmp_path, COLLAB_IMAGE=image(tmp_path, "sif"), SETUP="COLLAB_MOUNTS=(/data)")
    binds = ["--bind", str(tmp_path), "--bind", "/data"]
    assert found == [
        *("apptainer", "exec", "--nv", "--env", "CUDA_HOME=/usr/local/cuda", "--pwd", str(tmp_path)),
        *(*binds, str(tmp_path / "x.sif"), IN_IMAGE),
    ]


def test_the_hosts_toolkit_does_not_reach_an_apptainer_image(tmp_path: Path) -> None:
    """Apptainer passes the environment on."""
    env = {**HOSTS, "CUDA_VISIBLE_DEVICES": "1", "COLLAB_IMAGE": image(tmp_path, "sif")}
    lines = run(tmp_path, "env", **env).stdout.splitlines()
    assert "CUDA_VISIBLE_DEVICES=1" in lines
    assert not [line for line in lines if line.partition("=")[0] in HOSTS and not line.startswith("CUDA_HOME=")]


def test_an_enroot_image_starts_in_the_folder_with_the_jobs_variables(tmp_path: Path) -> None:
    # enroot's options end at the image; the stand-in runs the rest here
    path = image(tmp_path, "sqsh")
    program(tmp_path / "bin" / "enroot", f'while [ "$1" != {path} ]; do echo "$1"; shift; done; shift; exec "$@"')
    python = program(tmp_path / "python", 'echo "in $PWD: $@"')
    env = {"COLLAB_IMAGE": path, "COLLAB_PYTHON": str(python), "DESK_API_KEY": "k", "SLURM_JOB_ID": "7"}
    env |= {"CUDA_VISIBLE_DEVICES": "1", **HOSTS}
    done = run(tmp_path, 'exec "${COLLAB_RUN[@]}" -m a "b c"', **env)
    lines = done.stdout.splitlines()
    assert lines[-1] == f"in {tmp_path}: -m a b c"
    passed = [name for option, name in itertools.pairwise(lines) if option == "--env"]
    assert {"DESK_API_KEY", "SLURM_JOB_ID", "PYTHONUNBUFFERED", "CUDA_VISIBLE_DEVICES"} <= set(passed)
    assert not {"PATH", "HOME", *HOSTS} & set(passed)
    assert f"{tmp_path}:{tmp_path}" in lines
    assert "k" not in lines  # a value would be in the process list


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("x.tar", "is neither a .sif (Apptainer) nor a .sqsh (enroot)"), ("absent.sif", "no image at COLLAB_IMAGE=")],
)
def test_what_is_no_image_is_one_sentence(tmp_path: Path, name: str, sentence: str) -> None:
    done = run(tmp_path, "true", COLLAB_IMAGE=str(tmp_path / name))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert sentence in done.stderr


def test_a_node_without_the_runtime_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.sif").touch()
    done = run(tmp_path, "true", COLLAB_IMAGE=str(tmp_path / "x.sif"), PATH=f"{tmp_path}:/usr/bin:/bin")
    assert done.returncode == 2
    assert "apptainer is not installed on" in done.stderr
