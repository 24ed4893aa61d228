"""The documentation as a site: it is built strictly, and a link that leads nowhere fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=root,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What the site is made of, as links: a test replaces what it breaks."""
    root = tmp_path / "tree"
    root.mkdir()
    for path in REPOSITORY.iterdir():
        if path.name not in {"docs", "tools", ".git", ".venv"}:
            (root / path.name).symlink_to(path)
    for name in ("docs", "tools"):
        shutil.copytree(REPOSITORY / name, root / name, ignore=shutil.ignore_patterns("node_modules", "__pycache__"))
    return root


@pytest.mark.slow
def test_every_page_is_there_and_the_links_of_the_readme_lead_to_them(tmp_path: Path) -> None:
    done = build(REPOSITORY, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    pages = {path.stem for path in (tmp_path / "site").glob("*.html")}
    assert {path.stem for path in (REPOSITORY / "docs").glob("*.md")} <= pages
    start = (tmp_path / "site" / "index.html").read_text()
    assert 'href="install.html"' in start
    assert 'href="CONTRIBUTING.html"' in start
    assert "https://fonts" not in start  # nothing is fetched from elsewhere
    assert (tmp_path / "site" / "images" / "tensorboard.png").is_file()


@pytest.mark.parametrize(
    "link, says",
    [
        ("[a](no_such_page.md)", "no_such_page.md does not exist"),
        ("[a](install.md#no-such-heading)", "no-such-heading"),
        ("[a](../conf/no_such.yaml)", "no_such.yaml does not exist"),
    ],
)
@pytest.mark.slow
def test_a_link_that_leads_nowhere_fails(tree: Path, tmp_path: Path, link: str, says: str) -> None:
    page = tree / "docs" / "viewer.md"
    page.write_text(page.read_text() + f"\n{link}\n")
    done = build(tree, tmp_path / "site")
    assert done.returncode != 0
    assert says in done.stdout + done.stderr
