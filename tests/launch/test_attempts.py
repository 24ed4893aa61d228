"""The attempts of a run: numbers, folders, the link to the newest one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from collab_megatron.errors import RunError
from collab_megatron.launch.attempts import Attempt, begin_attempt


def test_every_start_has_the_next_number_and_the_link_points_to_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = tmp_path / "logs" / "rl"
    for number in (1, 2, 3):
        folder = logs / f"attempt-{number}"
        assert begin_attempt(logs) == Attempt(number, folder)
        assert os.readlink(logs / "latest") == folder.name  # relative: a run folder may be moved
        (folder / "driver.log").write_text(str(number))
        assert (logs / "latest" / "driver.log").read_text() == str(number)
    assert sorted(path.name for path in logs.iterdir()) == ["attempt-1", "attempt-2", "attempt-3", "latest"]
    assert capsys.readouterr().out.splitlines()[-1] == f"attempt     3, logs in {logs}/attempt-3"


def test_numbers_are_numbers_and_what_else_is_there_stays(tmp_path: Path) -> None:
    for name in ("attempt-9", "attempt-10", "attempt-0011", "attempt-x", "attempt-99.old", "engines"):
        (tmp_path / name).mkdir()
    (tmp_path / "driver.log").write_text("of an earlier version")
    (tmp_path / ".latest").symlink_to("of an attempt that was killed while it made the link")
    assert begin_attempt(tmp_path).number == 11
    assert os.readlink(tmp_path / "latest") == "attempt-11"
    assert (tmp_path / "driver.log").exists()
    assert not (tmp_path / ".latest").is_symlink()


def test_a_removed_attempt_in_the_middle_leaves_its_number_unused(tmp_path: Path) -> None:
    for _ in range(3):
        begin_attempt(tmp_path)
    (tmp_path / "attempt-2").rmdir()
    assert begin_attempt(tmp_path).number == 4


def test_a_file_system_without_links_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    assert begin_attempt(tmp_path).folder.is_dir()
    assert f"no link {tmp_path}/latest to attempt-1: Operation not permitted" in capsys.readouterr().out


def test_a_disk_that_refuses_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot create a folder for the logs in .*file/rl \(Not a directory\)"):
        begin_attempt(tmp_path / "file" / "rl")
