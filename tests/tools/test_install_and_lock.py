"""make install finds an interpreter that fits; the locks still resolve, where a package index can be reached."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
REQUIREMENTS = REPOSITORY / "requirements"
COMMANDS = (
    "bash",
    "cat",
    "tr",
    "find",
    "sort",
    "xargs",
    "sha256sum",
    "cut",
    "dirname",
    "head",
    "sh",
    "awk",
    "mkdir",
    "cp",
    "chmod",
    "tail",
)
NO_CUDA = {"CUDA_HOME": "/nonexistent"}
UNREACHABLE = 3  # exit code of tools/lock.sh


def interpreter(file: Path, version: str, *, has_glibc: bool = True, venv: str = "") -> None:
    """A Python of that version, as far as tools/install.sh asks. venv: commands that make an environment."""
    file.parent.mkdir(parents=True, exist_ok=True)
    minor = ".".join(version.split(".")[:2])
    (file.parent / "Python.h").touch()
    file.write_text(
        f"""#!/bin/sh
case "$1 $2" in
  *sysconfig*) echo {file.parent} ;;
  -c*) echo {minor} ;;
  "-m venv") {venv or "exit 1"} ;;
  --version*) echo Python {version} ;;
  "- "*) exit {1 - has_glibc} ;;
  *) exit 1 ;;
esac
"""
    )
    file.chmod(0o755)


def program(file: Path, script: str = "exit 0") -> None:
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


def install(tmp_path: Path, *arguments: str, **env: str) -> str:
    """tools/install.sh in a copy, up to the environment that no fake interpreter can make; its whole output."""
    copy = tmp_path / "repository"
    if not copy.exists():
        shutil.copytree(REQUIREMENTS, copy / "requirements")
        shutil.copytree(REPOSITORY / "tools" / "cpu_support", copy / "tools" / "cpu_support")
        shutil.copy(REPOSITORY / "tools" / "install.sh", copy / "tools" / "install.sh")
        system = tmp_path / "system"  # the commands that it needs, and no other Python
        system.mkdir()
        for command in COMMANDS:
            found = shutil.which(command)
            assert found is not None, command
            (system / command).symlink_to(found)
    done = subprocess.run(
        ["bash", "tools/install.sh", *arguments],
        cwd=copy,
        env={"PATH": f"{tmp_path / 'bin'}:{tmp_path / 'system'}", "HOME": str(tmp_path / "home"), **NO_CUDA, **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    return done.stdout + done.stderr


def test_no_interpreter_that_fits(tmp_path: Path) -> None:
    assert "no Python 3.11 or 3.12 found, on PATH or in" in install(tmp_path)
    interpreter(tmp_path / "bin" / "python3", "3.13.1")
    assert "no Python 3.11 or 3.12 found" in install(tmp_path)
    interpreter(tmp_path / "bin" / "python3.11", "3.11.7")
    assert "no Python 3.12 found" in install(tmp_path, "gpu")
    assert "python3 is not a Python 3.12" in install(tmp_path, "gpu", PYTHON=str(tmp_path / "bin" / "python3"))
    assert "neither cpu nor gpu" in install(tmp_path, "tpu")


def test_the_interpreter_of_a_kind(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    interpreter(tmp_path / "home" / ".pyenv" / "versions" / "3.12.1" / "bin" / "python", "3.12.1")
    assert "for cpu with Python 3.12.1" in install(tmp_path)
    interpreter(tmp_path / "bin" / "python3.11", "3.11.7")
    assert "for cpu with Python 3.11.7" in install(tmp_path)
    program(tmp_path / "bin" / "g++")
    found = install(tmp_path, "gpu")
    assert "for gpu with Python 3.12.1" in found
    assert "apt-get install python3.12-venv" in found
    (tmp_path / "repository" / ".venv").mkdir()
    (tmp_path / "repository" / ".venv" / ".kind").write_text("gpu\n")
    assert "for gpu with" in install(tmp_path)  # make test on a GPU node keeps its environment


def test_what_pip_does_not_say_is_checked_before_it_fetches_anything(tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python3.12"
    interpreter(python, "3.12.3", has_glibc=False)
    assert "no C++ compiler (g++): install g++" in install(tmp_path, "gpu")
    program(tmp_path / "bin" / "g++")
    assert "this system's C library is older than glibc 2.34: use the Containerfile" in install(tmp_path, "gpu")
    interpreter(python, "3.12.3")
    assert "warning: no NVIDIA driver here" in install(tmp_path, "gpu")
    program(tmp_path / "bin" / "nvidia-smi", "echo 570.86.10; echo 570.86.10")
    assert "NVIDIA's driver is 570.86.10, and CUDA 13 needs 580 or newer: update it" in install(tmp_path, "gpu")
    program(tmp_path / "bin" / "nvidia-smi", "echo 580.65.06; echo 580.65.06")
    found = install(tmp_path, "gpu")
    assert "driver" not in found
    assert "warning: no nvcc in PATH or CUDA_HOME" in found
    program(tmp_path / "bin" / "nvcc")
    assert "warning" not in install(tmp_path, "gpu")
    (tmp_path / "bin" / "Python.h").unlink()
    assert "Python.h, which transformer-engine is compiled with" in install(tmp_path, "gpu")


def test_what_is_compiled_finds_the_programs_of_the_new_environment(tmp_path: Path) -> None:
    """transformer-engine is built with the ninja that the lock has."""
    inner = 'case "$*" in *source.txt*) command -v ninja; exit 1 ;; esac'
    venv = f"mkdir -p .venv/bin; printf '#!/bin/sh\\n%s\\n' '{inner}' >.venv/bin/python; chmod +x .venv/bin/python"
    interpreter(tmp_path / "bin" / "python3.12", "3.12.3", venv=f"{venv}; cp .venv/bin/python .venv/bin/ninja")
    for name in ("g++", "nproc"):
        program(tmp_path / "bin" / name)
    assert f"{tmp_path}/repository/.venv/bin/ninja" in install(tmp_path, "gpu")


def pins(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9][^ ]*)==([^ ]+)", (REQUIREMENTS / name).read_text(), re.MULTILINE))


def test_the_gpu_lock_differs_from_the_cpu_lock_only_where_it_says_so() -> None:
    gpu, cpu = pins("gpu.txt"), {**pins("cpu.txt"), **pins("dev.txt")}
    assert set(cpu) <= set(gpu)
    differing = {name for name, version in cpu.items() if gpu[name] != version}
    assert differing == set(pins("gpu-overrides.txt")) - {"openai"}
    assert gpu["megatron-core"] == pins("megatron-py312.txt")["megatron-core"]
    assert gpu["sglang"] == pins("nodeps.txt")["sglang"]
    engine = {gpu[name] for name in ("transformer-engine", "transformer-engine-cu13", "transformer-engine-torch")}
    assert len(engine) == 1  # transformer-engine refuses to be imported otherwise


def test_setup_cfg_and_the_table_of_bugs_have_the_locked_megatrons() -> None:
    locked = {pins(f"megatron-py{python}.txt")["megatron-core"] for python in (311, 312)}
    assert set(re.findall(r"megatron-core==([^;\s]+)", (REPOSITORY / "setup.cfg").read_text())) == locked
    table = (REPOSITORY / "tests" / "trainer" / "actor" / "test_upstream_bugs.py").read_text()
    assert set(re.findall(r'^    "([\d.]+)": ', table, re.MULTILINE)) == locked


@pytest.mark.slow
def test_the_locks_resolve() -> None:
    """No pinned version has gone from the index, and every lock follows from its .in file."""
    done = subprocess.run(
        ["bash", "tools/lock.sh", "--check"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    if done.returncode == UNREACHABLE:
        pytest.skip(f"no package index can be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    assert "requirements/gpu.txt: " in done.stdout
