"""README.md says what is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tree() -> str:
    return subprocess.run(
        [sys.executable, "tools/readme_tree.py"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout


def test_the_tree_in_the_readme_is_the_tree(tree: str) -> None:
    assert len(tree.splitlines()) > 100
    assert tree in (REPOSITORY / "README.md").read_text(), "run python tools/readme_tree.py --write"


def test_every_file_has_a_phrase(tree: str) -> None:
    bare = [line for line in tree.splitlines() if re.fullmatch(r"\s*[\w.]+\.(py|yaml|sh|sbatch)", line)]
    assert bare == []


def test_what_the_readme_links_to_exists() -> None:
    text = (REPOSITORY / "README.md").read_text()
    linked = [target for target in re.findall(r"\]\(([^)]+)\)", text) if not target.startswith("http")]
    assert linked
    assert [target for target in linked if not (REPOSITORY / target).exists()] == []
