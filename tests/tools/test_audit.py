"""make audit: refused releases by name, with and without a network; advisories only where their database answers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from collab_megatron.doctor.environment import REFUSED
from tests.conftest import REPOSITORY, environment
from tools.audit import EXIT_UNREACHABLE, PIP_AUDIT, Unreachable, installed, pinned, refused, sentences

NOWHERE = dict.fromkeys(("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"), "")
OFFLINE = NOWHERE | {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_CONFIG_FILE": "/dev/null", "PIP_NO_CACHE_DIR": "1"}
LOCKS = sorted((REPOSITORY / "requirements").glob("*.txt"))
JINJA = {"name": "jinja2", "version": "3.1.2"}


def audit(lock: Path) -> subprocess.CompletedProcess[str]:
    """Of one lock, with no package index in reach."""
    return subprocess.run(
        [sys.executable, "tools/audit.py", str(lock)],
        cwd=REPOSITORY,
        env={**environment(), **OFFLINE, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
def test_offline_is_a_sentence_and_an_exit_code_of_its_own(tmp_path: Path) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text("jinja2==3.1.2 \\\n    --hash=sha256:00\n")
    said = audit(lock)
    assert said.returncode == EXIT_UNREACHABLE, said.stderr
    assert said.stdout == "refused releases: 0 found in 1 locks and this environment\n"
    (sentence,) = said.stderr.splitlines()
    assert sentence.startswith("advisories were not checked: no package index or database could be reached (")
    assert f"pip-audit=={PIP_AUDIT}" in sentence
    lock.write_text("litellm==1.82.7\n")
    said = audit(lock)
    assert said.returncode == 1
    assert "lock.txt: litellm 1.82.7 was published with code that steals credentials" in said.stdout


def test_a_lock_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    said = audit(tmp_path / "none.txt")
    assert said.returncode == 2
    assert said.stderr.startswith(f"error: {tmp_path / 'none.txt'} cannot be read (FileNotFoundError)")


def test_no_lock_and_no_installed_package_is_refused() -> None:
    assert len(LOCKS) > 5
    pins = {lock.name: pinned(lock) for lock in LOCKS}
    assert pins["cpu.txt"]["litellm"] == installed()["litellm"]
    assert pins["gpu.txt"]["torch"]
    assert [each for name, versions in pins.items() for each in refused(name, versions)] == []


@pytest.mark.parametrize("version", REFUSED["litellm"])
def test_every_refused_release_is_found_in_a_lock(version: str, tmp_path: Path) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text(f"aiohttp==3.14.5\nLiteLLM=={version} ; python_version > '3' \\\n    --hash=sha256:00\n")
    (sentence,) = refused("lock.txt", pinned(lock))
    assert sentence == f"lock.txt: litellm {version} was published with code that steals credentials"


def test_the_note_where_litellm_is_pinned_names_the_same_releases() -> None:
    (line,) = (
        line for line in (REPOSITORY / "requirements" / "cpu.in").read_text().splitlines() if line.startswith("litellm")
    )
    assert set(re.findall(r"\d+\.\d+\.\d+", line.partition("NEVER")[2])) == set(REFUSED["litellm"])


def test_advisories_are_told_with_their_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    known = {**JINJA, "vulns": [{"id": "PYSEC-1", "fix_versions": ["3.1.3"]}, {"id": "GHSA-2", "fix_versions": []}]}
    skipped = {"name": "torch", "skip_reason": "Dependency not found on PyPI"}
    assert list(sentences("cpu.txt", [known, skipped, {"name": "zmq", "version": "1", "vulns": []}])) == [
        "cpu.txt: jinja2 3.1.2: PYSEC-1, fixed in 3.1.3",
        "cpu.txt: jinja2 3.1.2: GHSA-2, fixed in no release",
    ]
    assert "cpu.txt: not checked, because PyPI does not have these versions: torch" in capsys.readouterr().out
    with pytest.raises(Unreachable, match=r"advisories of none of the 1 packages in cpu\.txt"):
        list(sentences("cpu.txt", [skipped]))
