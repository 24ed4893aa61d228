"""The attempts of a run: every start, by hand or by Slurm, has a number and a folder for its logs.

    logs/NAME/attempt-1/  attempt-2/  latest -> attempt-2

The number counts the folders, so it is also right after a new `sbatch`, which Slurm does not count as a restart. For
the owner of the run's lock (lock.py).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from collab_megatron.errors import RunError

LATEST = "latest"
_FOLDER = re.compile(r"attempt-([1-9][0-9]*)")


@dataclass(frozen=True)
class Attempt:
    """One start of a run."""

    number: int  # counts from 1
    folder: Path  # of its logs


def begin_attempt(logs_dir: Path) -> Attempt:
    """Make the next attempt's folder in `logs_dir`, point the link `latest` to it, and tell the user.

    Raises RunError if the disk refuses; a file system without links gets none.
    """
    try:
        logs_dir.mkdir(parents=True, exist_ok=True)
        number = 1 + max((attempt_of(path) for path in logs_dir.iterdir()), default=0)
        folder = logs_dir / f"attempt-{number}"
        folder.mkdir()
    except OSError as error:
        raise RunError(
            f"cannot create a folder for the logs in {logs_dir} ({error.strerror}): free some space, or check its "
            "permissions"
        ) from None
    print(f"attempt     {number}, logs in {folder}", flush=True)
    _link(logs_dir / LATEST, folder.name)
    return Attempt(number, folder)


def attempt_of(folder: Path) -> int:
    """The number of an attempt's folder; 0 for other files."""
    found = _FOLDER.fullmatch(folder.name)
    return int(found[1]) if found else 0


def _link(link: Path, target: str) -> None:
    """Replace the link; a reader sees the old target or the new one."""
    aside = link.with_name(f".{link.name}")
    try:
        aside.unlink(missing_ok=True)  # of an attempt that was killed here
        aside.symlink_to(target)
        os.replace(aside, link)
    except OSError as error:
        print(f"no link {link} to {target}: {error.strerror}", flush=True)
