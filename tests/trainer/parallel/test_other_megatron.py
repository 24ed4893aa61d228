"""Megatron-Core 0.19 under Python 3.11, where 0.16 is installed: its bugs, and checkpoints with real ranks.

The wheel comes from the package index, by the hash in requirements/megatron-py312.txt. It is for Python 3.12, but what
is used here of it is not compiled. An interpreter of its own finds it before what is installed; so do its ranks.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import megatron.core
import pytest

from tests.forks import REPO

LOCK = REPO / "requirements" / "megatron-py312.txt"
TESTS = (
    "tests/trainer/actor/test_upstream_bugs.py",
    "tests/trainer/parallel/test_checkpoint_parallel.py::test_hostile_files_are_refused_and_a_killed_save_is_never_chosen",
)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the locked newer megatron-core, and all that is installed here."""
    if sys.version_info >= (3, 12):
        pytest.skip("megatron-core of Python 3.12 is the installed one")
    folder = tmp_path_factory.mktemp("newer_megatron")
    download = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--require-hashes"]
    download += ["--only-binary=:all:", "--python-version=3.12", "--platform=manylinux_2_28_x86_64", "--retries=1"]
    done = subprocess.run(
        [*download, f"--dest={folder}", f"--requirement={LOCK}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode:
        assert "THESE PACKAGES DO NOT MATCH" not in done.stderr, done.stderr
        pytest.skip(f"no package index can be reached: {done.stderr.strip().splitlines()[-1]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], timeout=60, check=True)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    installed = sysconfig.get_path("purelib")
    (site / "newer_megatron.pth").write_text(f"{folder / 'site'}\nimport site; site.addsitedir({installed!r})\n")
    return folder / "venv" / "bin" / "python"


@pytest.mark.slow
def test_the_newer_megatron_saves_and_loads(python: Path) -> None:
    where = subprocess.run(
        [str(python), "-c", "import importlib.util as u; print(u.find_spec('megatron.core').origin)"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert where.stdout.strip() != megatron.core.__file__
    done = subprocess.run(
        [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS],
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout.splitlines()[-1]
