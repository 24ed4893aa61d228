"""Which folder counts as a checkpoint, and what is kept."""

from __future__ import annotations

import errno
from importlib import metadata
from pathlib import Path

import pytest

from collab_megatron.errors import UserError
from collab_megatron.trainer.convert.disk_space import is_disk_full
from collab_megatron.wire.checkpoints import (
    BEST,
    MARKER,
    complete_checkpoints,
    newest_complete,
    read_best,
    read_info,
    retire,
    step_folder,
    write_best,
    write_marker,
)


def make(directory: Path, step: int) -> Path:
    folder = step_folder(directory, step)
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "metadata.json").write_text("{}")
    write_marker(folder, step=step, layout={"tensor": 2}, extra={"cursor": step * 10})
    return folder


def test_newest_complete_never_chooses_a_torn_one(tmp_path: Path) -> None:
    assert newest_complete(tmp_path / "not there") is None
    assert newest_complete(tmp_path) is None
    whole = make(tmp_path, 40)
    (make(tmp_path, 50) / MARKER).unlink()
    (make(tmp_path, 60) / MARKER).write_text('{"format": 1, "st')
    (make(tmp_path, 70) / "model" / "metadata.json").unlink()
    make(tmp_path, 80).rename(tmp_path / "step_00000080.tmp")
    make(tmp_path, 90).rename(tmp_path / "step_00000091")  # says 90
    assert newest_complete(tmp_path) == whole
    assert read_info(whole).step == 40
    assert read_info(whole).extra == {"cursor": 400}


def test_retire_keeps_the_newest_and_clears_what_a_crash_left(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        make(tmp_path, step)
    make(tmp_path, 101).rename(tmp_path / "step_00000101.tmp")
    (tmp_path / "notes.txt").write_text("the user's own")
    retire(tmp_path, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "step_00000010", "step_00000100"]


def test_retire_spares_every_nth_step(tmp_path: Path) -> None:
    for step in (10, 15, 20, 25, 30, 35):
        make(tmp_path, step)
    retire(tmp_path, keep_last=1, keep_every=10)
    assert [p.name for p in complete_checkpoints(tmp_path)] == [f"step_000000{step}" for step in (10, 20, 30, 35)]
    retire(tmp_path, keep_last=1)
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step_00000035"]


def test_the_best_stays_until_a_better_one_takes_its_place(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        make(tmp_path, step)
    assert read_best(tmp_path) is None
    write_best(tmp_path, 10, 1.5)
    retire(tmp_path, keep_last=1)
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step_00000010", "step_00000040"]
    best = read_best(tmp_path)
    assert best is not None
    assert (best.step, best.loss, best.folder) == (10, 1.5, tmp_path / "step_00000010")
    write_best(tmp_path, 40, 1.25)
    retire(tmp_path, keep_last=1)
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step_00000040"]
    write_best(tmp_path, 50, 1.0)  # a checkpoint that is not there
    assert read_best(tmp_path) is None
    (tmp_path / BEST).write_text("{")
    with pytest.raises(UserError, match=r"best\.json cannot be read"):
        read_best(tmp_path)


def test_the_marker_says_the_versions(tmp_path: Path) -> None:
    versions = read_info(make(tmp_path, 1)).versions
    assert versions["torch"] == metadata.version("torch")
    assert {"python", "collab_megatron", "megatron-core", "transformers"} <= versions.keys()


def test_unreadable_and_foreign_checkpoints_are_named(tmp_path: Path) -> None:
    folder = make(tmp_path, 1)
    (folder / MARKER).write_text('{"format": 99, "step": 1, "extra": {}, "layout": {}}')
    with pytest.raises(UserError, match="format 99"):
        read_info(folder)
    with pytest.raises(UserError, match="not a complete checkpoint"):
        read_info(tmp_path)


def test_a_full_disk_is_known_however_it_is_wrapped(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    wrapped = RuntimeError("Worker failure")
    wrapped.__cause__ = full

    class CheckpointException(BaseException):
        def __init__(self) -> None:
            self.failures = {1: (wrapped, None)}

    assert is_disk_full(full, tmp_path)
    assert is_disk_full(wrapped, tmp_path)
    assert is_disk_full(CheckpointException(), tmp_path)
    assert is_disk_full(RuntimeError("[Errno 28] No space left on device"), tmp_path)
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied"), tmp_path)
    assert not is_disk_full(RuntimeError("unexpected pos 704 vs 598"), tmp_path)  # this disk has room
