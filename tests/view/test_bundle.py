"""The committed script of the viewer is what its modules and locked libraries give."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

VIEWER = REPOSITORY / "tools" / "viewer"
MODULES = REPOSITORY / "collab_megatron" / "view" / "browser"
BUNDLE = REPOSITORY / "collab_megatron" / "view" / "bundle"
OUTDATED = "run npm ci && npm run build in tools/viewer, and commit collab_megatron/view/bundle"
INSTALL_S, BUILD_S = 200.0, 60.0


def digest(modules: Path, lock: Path) -> str:
    """As build.mjs computes it."""
    found = hashlib.sha256()
    for file in (*sorted(modules.glob("*.js"), key=lambda path: path.name), lock):
        content = file.read_bytes()
        found.update(f"{file.name} {len(content)}\n".encode() + content)
    return found.hexdigest()


def test_the_bundle_was_built_from_these_modules_and_this_lock() -> None:
    first = (BUNDLE / "viewer.js").read_text().split("\n", 1)[0]
    assert first == f"// built from {digest(MODULES, VIEWER / 'package-lock.json')}", OUTDATED


def test_a_changed_module_changes_the_digest(tmp_path: Path) -> None:
    copy = shutil.copytree(MODULES, tmp_path / "browser")
    assert digest(copy, VIEWER / "package-lock.json") == digest(MODULES, VIEWER / "package-lock.json")
    (copy / "keys.js").write_text((copy / "keys.js").read_text() + " ")
    assert digest(copy, VIEWER / "package-lock.json") != digest(MODULES, VIEWER / "package-lock.json")


def test_the_lock_names_no_host_and_pins_every_package() -> None:
    lock = (VIEWER / "package-lock.json").read_text()
    assert "://" not in re.sub(r'"url": "[^"]*"', "", lock)  # a package's own link for donations
    assert '"resolved"' not in lock
    assert lock.count('"integrity": "sha512-') == lock.count('"node_modules/') > 3


def test_every_librarys_license_is_there() -> None:
    text = (BUNDLE / "LICENSES.txt").read_text()
    assert all(name in text for name in ("preact 10.", "@tanstack/virtual-core 3.", "d3-hierarchy 3."))
    assert text.count("Copyright") + text.count("(c)") >= 3


@pytest.mark.slow
def test_a_new_build_gives_the_committed_bundle(tmp_path: Path) -> None:
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("node or npm is not installed: the viewer's script cannot be built again here")
    folder = VIEWER if (VIEWER / "node_modules" / "esbuild").is_dir() else with_libraries(tmp_path / "viewer")
    command = ["node", str(folder / "build.mjs"), str(MODULES), str(tmp_path / "bundle")]
    subprocess.run(command, check=True, timeout=BUILD_S, capture_output=True)
    for name in ("viewer.js", "LICENSES.txt"):
        assert (tmp_path / "bundle" / name).read_bytes() == (BUNDLE / name).read_bytes(), OUTDATED


def with_libraries(folder: Path) -> Path:
    """A copy of tools/viewer with what its lock names; skips the test where no registry answers."""
    shutil.copytree(VIEWER, folder, ignore=shutil.ignore_patterns("node_modules"))
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=0", "--fetch-timeout=20000"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_S, check=False)
    if done.returncode and re.search(r"ENOTFOUND|ECONNREFUSED|ECONNRESET|ETIMEDOUT|EAI_AGAIN|network", done.stderr):
        pytest.skip("no npm registry answers: the viewer's script cannot be built again here")
    assert done.returncode == 0, done.stderr[-2000:]
    return folder
