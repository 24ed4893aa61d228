"""A wheel of the project: what is in it, and its commands without a checkout."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a copy: a build writes into the tree that it builds."""
    work = tmp_path_factory.mktemp("wheel")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, work)
    shutil.copytree(
        REPOSITORY / "collab_megatron", work / "collab_megatron", ignore=shutil.ignore_patterns("__pycache__")
    )
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run(
        [*pip, "--wheel-dir", "dist", "."], cwd=work, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (made,) = (work / "dist").iterdir()
    return made


@pytest.mark.slow
def test_every_file_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    package = REPOSITORY / "collab_megatron"
    files = {str(path.relative_to(REPOSITORY)) for path in package.rglob("*") if path.is_file()}
    wanted = {name for name in files if "__pycache__" not in name}
    with zipfile.ZipFile(wheel) as content:
        there = {name for name in content.namelist() if name.startswith("collab_megatron/")}
    assert there == wanted


@pytest.mark.slow
def test_its_commands_run_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as content:
        content.extractall(tmp_path / "site")
        (listed,) = [name for name in content.namelist() if name.endswith("entry_points.txt")]
        entries = configparser.ConfigParser()
        entries.read_string(content.read(listed).decode())
    scripts = dict(entries["console_scripts"])
    assert set(scripts) == {
        f"collab-{name}"
        for name in ("train-rl", "train-sft", "train-dpo", "evaluate", "rescore", "collect", "watch", "view", "doctor")
    }
    (tmp_path / "empty").mkdir()
    call = "import sys; from {} import {} as main; sys.argv = [sys.argv[1], '--help']; main()"
    for command, target in scripts.items():
        done = subprocess.run(
            [sys.executable, "-c", call.format(*target.split(":")), command],
            cwd=tmp_path / "empty",
            env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.startswith("usage: ")
