"""Can a run write where its config says, and read what it names? Looked at before a process starts; nothing is left.

A folder that is not there yet is tried by making, and removing at once, a folder in the nearest one that is: rights,
read-only mounts and kernel file systems show themselves in no other way.
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
    """Raise UserError naming `key` unless `path` is a folder that can be written to, or can be made."""
    _check_folder(key, path, path)


def check_file(key: str, path: Path) -> None:
    """The same of a file that is written: it may be there, no folder of its name may."""
    if _nearest(key, path, path) == path.absolute() and path.is_dir():
        raise UserError(f"{key}={path} is a folder, and a file is wanted: name one in it")
    _check_folder(key, path, path.absolute().parent)


def check_run(run: RunSection) -> None:
    """Raise UserError for a run.dir, or one of the run's folders in it, that cannot be written to."""
    check_folder("run.dir", run.dir)
    for path in (
        *(run.logs_dir, run.checkpoints_dir, run.tensorboard_dir, run.conversations_dir, run.evaluations_dir),
        *(run.weights_dir, run.engine_probe_file.parent),
    ):
        _check_folder("run.dir", path, path)


def check_journal_file(section: JournalSection, default: Path) -> None:
    """Raise UserError unless the journal is one, or can be made."""
    path = section.path or default
    check_file("journal.path", path)
    check_journal(path, section.replay)


def check_prompt_files(node: BaseModel) -> None:
    """Raise UserError naming the key of a prompt file that cannot be read, used by this config or not: the run's
    lineage holds the contents of all."""
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


def _check_folder(key: str, said: Path, path: Path) -> None:
    nearest = _nearest(key, said, path)
    if not nearest.is_dir():
        raise UserError(f"{key}={said} cannot be written to, because {nearest} is a file: choose another {key}")
    try:
        Path(tempfile.mkdtemp(prefix=".collab_megatron_", dir=nearest)).rmdir()
    except OSError as error:
        raise UserError(
            f"{key}={said} cannot be made: {nearest} takes no new folder ({error.strerror}); choose another {key}"
        ) from None


def _nearest(key: str, said: Path, path: Path) -> Path:
    """The path, or the nearest of its parents that is there."""
    try:
        return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise UserError(f"{key}={str(said)[:80]} cannot be used ({error.strerror}): choose another {key}") from None
