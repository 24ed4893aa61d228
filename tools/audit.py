"""Looks for known weaknesses of the locked and of the installed packages.

    make audit                                     all locks in requirements/, and this environment
    python tools/audit.py requirements/cpu.txt     one lock

1. Releases that must not run (collab_megatron/doctor/environment.py, REFUSED: litellm's that steal credentials), in the
   locks and installed. Needs no network.
2. pip-audit with PyPI's database of advisories, in an environment that is thrown away.

Exit code 0: nothing found; 1: something found; 2: a lock that cannot be read; 3: the database cannot be reached, and
nothing is known about step 2.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from collab_megatron.doctor.environment import REFUSED
from collab_megatron.errors import RunError, UserError, run_cli

PIP_AUDIT = "2.10.1"  # of the Python Packaging Authority, Apache-2.0; only this command needs it and its 30 packages
EXIT_UNREACHABLE = 3  # as of tools/lock.sh
INSTALL_S = 300
AUDIT_S = 900
REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements"
_PINNED = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;\\]+)", re.MULTILINE)


class Unreachable(RunError):
    """No package index, or no database."""


def pinned(lock: Path) -> dict[str, str]:
    """Name -> version of a lock. Raises UserError if it cannot be read."""
    try:
        text = lock.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{lock} cannot be read ({type(error).__name__}): name a file of requirements/") from None
    return {name.lower().replace("_", "-"): version for name, version in _PINNED.findall(text)}


def installed() -> dict[str, str]:
    """Of the packages in REFUSED: name -> version in this environment."""
    found = {}
    for name in REFUSED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def refused(where: str, versions: Mapping[str, str]) -> Iterator[str]:
    """A sentence for every release that must not run."""
    for name, reasons in REFUSED.items():
        if (version := versions.get(name, "")) in reasons:
            yield f"{where}: {name} {version} {reasons[version]}"


def advisories(locks: Sequence[Path]) -> list[str]:
    """A sentence for every advisory about a pinned version. Raises Unreachable."""
    with tempfile.TemporaryDirectory(prefix="collab_audit_") as name:
        folder = Path(name)
        venv.create(folder / "venv", with_pip=True)
        python = str(folder / "venv" / "bin" / "python")
        quick = ("--disable-pip-version-check", "--retries", "1", "--timeout", "10")
        _ran([python, "-m", "pip", "install", "-qq", *quick, f"pip-audit=={PIP_AUDIT}"], INSTALL_S)
        found: list[str] = []
        for lock in locks:
            report = folder / "report.json"
            report.unlink(missing_ok=True)
            # the versions stand in the lock: nothing is resolved or installed
            what = ["--requirement", str(lock), "--no-deps", "--disable-pip", "--progress-spinner", "off"]
            command = [python, "-m", "pip_audit", *what, "--format", "json", "--output", str(report)]
            _ran(command, AUDIT_S, result=report)
            found += sentences(lock.name, json.loads(report.read_text())["dependencies"])
        return found


def sentences(lock: str, packages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Of pip-audit's report: `{"name": ..., "version": ..., "vulns": [{"id": ..., "fix_versions": [...]}]}`, or with a
    `skip_reason` for a package that the database does not know. Raises Unreachable if it knows none of them: an index
    that mirrors files only has no advisories."""
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    if packages and len(skipped) == len(packages):
        raise Unreachable(f"the index has advisories of none of the {len(packages)} packages in {lock}")
    if skipped:
        print(f"{lock}: not checked, because PyPI does not have these versions: {', '.join(skipped)}")
    for package in packages:
        for advisory in package.get("vulns", ()):
            fixed = ", ".join(advisory["fix_versions"]) or "no release"
            yield f"{lock}: {package['name']} {package['version']}: {advisory['id']}, fixed in {fixed}"


def _ran(command: Sequence[str], timeout_s: float, *, result: Path | None = None) -> None:
    """result: its presence shows success, since pip-audit ends with 1 for advisories and for errors."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise Unreachable(f"{command[2]} did not end within {timeout_s:g} s") from None
    if done.returncode and (result is None or not result.exists()):
        said = done.stderr.strip().splitlines() or ["no output"]
        raise Unreachable(f"{command[2]}: {said[-1][:300]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("locks", nargs="*", type=Path, default=sorted(REQUIREMENTS.glob("*.txt")))
    args = parser.parse_args()
    versions = {lock.name: pinned(lock) for lock in args.locks}
    found = [each for name, pins in versions.items() for each in refused(name, pins)]
    found += refused("installed", installed())
    for each in found:
        print(f"{each}: uninstall it, and change every key that this machine had")
    print(f"refused releases: {len(found)} found in {len(versions)} locks and this environment", flush=True)
    try:
        told = advisories([lock for lock in args.locks if versions[lock.name]])
    except Unreachable as error:
        print(
            f"advisories were not checked: no package index or database could be reached ({error}); run make audit "
            "where PyPI can be reached",
            file=sys.stderr,
        )
        sys.exit(1 if found else EXIT_UNREACHABLE)
    for each in told:
        print(each)
    print(f"advisories: {len(told)}")
    sys.exit(1 if found or told else 0)


if __name__ == "__main__":
    run_cli(main)
