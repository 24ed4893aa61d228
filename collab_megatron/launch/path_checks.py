"""Checks before the start that a run can write to the paths of its config, and read the files that it names.

For a folder that does not exist, a test folder is made in its nearest existing parent and removed at once. Nothing else
detects missing rights, read-only mounts and kernel file systems reliably.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from collab_megatron.config.sections import JournalSection, RunSection
from collab_megatron.errors import UserError
from collab_megatron.rollout.journal.store import check_journal


def check_folder(key: str, path: Path) -> None:
    """Raise UserError naming `key` unless `path` is a writable folder or can be created."""
    _check_folder(key, path, path)


def check_file(key: str, path: Path) -> None:
    """As `check_folder`, for a file: it may exist, a folder of its name may not."""
    if _nearest(key, path, path) == path.absolute() and path.is_dir():
        raise UserError(f"{key}={path} is a folder: name a file in it")
    _check_folder(key, path, path.absolute().parent)


def check_run(run: RunSection) -> None:
    """Raise UserError unless run.dir and the run's folders in it are writable or can be created."""
    check_folder("run.dir", run.dir)
    for path in (
        *(run.logs_dir, run.checkpoints_dir, run.tensorboard_dir, run.conversations_dir, run.evaluations_dir),
        *(run.weights_dir, run.engine_probe_file.parent),
    ):
        _check_folder("run.dir", path, path)


def check_journal_file(section: JournalSection, default: Path) -> None:
    """Raise UserError unless the file is a journal or can be created."""
    path = section.path or default
    check_file("journal.path", path)
    check_journal(path, section.replay)


def check_prompt_files(node: BaseModel) -> None:
    """Raise UserError naming the key of a prompt file that cannot be read. Unused ones count too: the run's lineage
    contains the contents of all."""
    for key, path in _prompt_files(node, ""):
        try:
            path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{key}={path} cannot be read ({error}): name a text file in UTF-8") from None


def _prompt_files(node: object, place: str) -> Iterator[tuple[str, Path]]:
    children: Iterator[tuple[object, object]] = iter(())
    if isinstance(node, BaseModel | dict):
        children = iter(node.items() if isinstance(node, dict) else node)
    elif isinstance(node, tuple):
        children = iter(enumerate(node))
    for key, value in children:
        at = f"{place}.{key}" if place else str(key)
        if isinstance(value, Path) and str(key).endswith("prompt_file"):
            yield at, value
        else:
            yield from _prompt_files(value, at)


def _check_folder(key: str, given: Path, path: Path) -> None:
    nearest = _nearest(key, given, path)
    if not nearest.is_dir():
        raise UserError(f"{key}={given} cannot be created, because {nearest} is a file: choose another {key}")
    try:
        Path(tempfile.mkdtemp(prefix=".collab_megatron_", dir=nearest)).rmdir()
    except OSError as error:
        raise UserError(
            f"{key}={given} is not writable: {nearest} refused a new folder ({error.strerror}); choose another {key}"
        ) from None


def _nearest(key: str, given: Path, path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    try:
        return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    except OSError as error:  # a name that is too long, a folder without read permission
        raise UserError(f"{key}={str(given)[:80]} cannot be used ({error.strerror}): choose another {key}") from None
