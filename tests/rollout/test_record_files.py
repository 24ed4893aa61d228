"""The record's files: each step once, torn and later steps taken out, closed and compressed files, several runs."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from collab_megatron.config.sections import RecordSection, RunSection
from collab_megatron.errors import RunError, UserError
from collab_megatron.rollout import record_files
from collab_megatron.rollout.record_files import RecordWriter, read_trees
from collab_megatron.trainer.rl_reporter import append_evaluation, drop_evaluations

PLAIN = RecordSection()


def line(step: int, text: str = "") -> bytes:
    return json.dumps({"schema": 1, "step": step, "text": text}, separators=(",", ":")).encode() + b"\n"


def steps(folder: Path) -> list[int]:
    return [tree["step"] for tree in read_trees(folder)]


@pytest.mark.parametrize("torn", [5, 60])
def test_a_step_is_written_once_and_a_torn_one_is_taken_out(tmp_path: Path, torn: int) -> None:
    first = RecordWriter(tmp_path, PLAIN, first_step=1)
    first.write(1, [line(1), line(1)])
    first.write(1, [line(1), line(1)])
    first.write(2, [line(2)])
    with (tmp_path / "shard0.jsonl").open("ab") as file:
        file.write(line(3) + line(3, "x" * 100)[:torn])  # killed in the middle of a step
    again = RecordWriter(tmp_path, PLAIN, first_step=None)
    again.write(2, [line(2)])
    again.write(3, [line(3), line(3)])
    again.write(3, [line(3), line(3)])
    assert steps(tmp_path) == [1, 1, 2, 3, 3]


def test_a_resumed_run_takes_out_what_will_be_run_again(tmp_path: Path) -> None:
    first = RecordWriter(tmp_path, PLAIN, first_step=1)
    for step in range(1, 5):
        first.write(step, [line(step)])
    with (tmp_path / "shard0.jsonl").open("ab") as file:
        file.write(line(5)[:5])
    again = RecordWriter(tmp_path, PLAIN, first_step=3)
    assert steps(tmp_path) == [1, 2]
    again.write(3, [line(3, "another")])
    assert [tree["text"] for tree in read_trees(tmp_path)] == ["", "", "another"]


@pytest.mark.parametrize("compress", ["zstd", "none"])
def test_full_files_are_closed_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: str) -> None:
    monkeypatch.setattr(record_files, "PART_BYTES", 100)
    section = RecordSection.model_validate({"compress": compress})
    first = RecordWriter(tmp_path, section, first_step=1)

    def trees(step: int) -> list[bytes]:
        return [line(step, "x" * 10), line(step, "y" * 10)]

    for step in range(1, 12):
        first.write(step, trees(step))
    end = ".zst" if compress == "zstd" else ""
    names = [f"shard0.{i:08d}-{i + 1:08d}.jsonl{end}" for i in range(1, 10, 2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "shard0.jsonl"]
    whole = list(read_trees(tmp_path))
    assert [tree["step"] for tree in whole] == [step for step in range(1, 12) for _ in range(2)]
    # started again, it goes on; resumed from the middle of a closed file, later steps go
    again = RecordWriter(tmp_path, section, first_step=None)
    again.write(10, [line(10, "again")])
    assert list(read_trees(tmp_path)) == whole
    resumed = RecordWriter(tmp_path, section, first_step=4)
    assert list(read_trees(tmp_path)) == whole[:6]
    for step in range(4, 12):
        resumed.write(step, trees(step))
    assert list(read_trees(tmp_path)) == whole
    RecordWriter(tmp_path, section, first_step=1)
    assert steps(tmp_path) == []


def test_a_kill_while_a_file_is_closed_leaves_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the closed file's name and the open one's end both hold the same steps."""
    first = RecordWriter(tmp_path, PLAIN, first_step=1)
    first.write(1, [line(1)])
    monkeypatch.setattr(record_files, "PART_BYTES", 1)
    first.write(2, [line(2)])
    (tmp_path / "shard0.jsonl").write_bytes(line(1) + line(2))
    (tmp_path / "shard0.00000003-00000004.jsonl.zst.tmp").write_bytes(b"half")
    RecordWriter(tmp_path, PLAIN, first_step=None)
    assert steps(tmp_path) == [1, 2]
    assert list(tmp_path.glob("*.tmp")) == []


@pytest.mark.parametrize("compress", ["zstd", "none"])
def test_a_kill_while_a_closed_file_is_cut_leaves_each_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: str
) -> None:
    """Between the shorter file's name and the longer one's end both hold the same steps."""
    section = RecordSection.model_validate({"compress": compress})
    monkeypatch.setattr(record_files, "PART_BYTES", 100)
    first = RecordWriter(tmp_path, section, first_step=1)
    for step in (1, 2):
        first.write(step, [line(step, "x" * 50)])
    monkeypatch.undo()
    assert not (tmp_path / "shard0.jsonl").exists()

    class Killed(Exception):
        pass

    def kill(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", kill)
        with pytest.raises(Killed):
            RecordWriter(tmp_path, section, first_step=2)
    assert len(list(tmp_path.glob("*-*.jsonl*"))) == 2
    assert steps(tmp_path) == [1]  # a reader too
    later = RecordWriter(tmp_path, section, first_step=9)  # not the step that was to be cut
    later.write(2, [line(2, "another")])
    assert [(tree["step"], tree["text"][:1]) for tree in read_trees(tmp_path)] == [(1, "x"), (2, "a")]
    assert len(list(tmp_path.glob("*-*.jsonl*"))) == 1


def test_a_damaged_line_of_the_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "shard0.jsonl").write_bytes(line(1) + b"half\n" + line(2) + line(3)[:9])
    with pytest.raises(UserError, match=r"shard0\.jsonl: line 2 is not a JSON object"):
        steps(tmp_path)


def test_every_other_step_and_an_end_to_the_size(tmp_path: Path) -> None:
    thin = RecordWriter(tmp_path / "thin", RecordSection(every=3), first_step=1)
    assert [step for step in range(1, 9) if thin.wants(step)] == [1, 4, 7]
    for step in range(1, 9):
        thin.write(step, [line(step)])
    assert steps(tmp_path / "thin") == [1, 4, 7]
    small = RecordWriter(tmp_path / "small", RecordSection(max_mb=1e-3), first_step=1)
    said = [small.write(step, [line(step, "x" * 400)]) for step in range(1, 6)]
    assert steps(tmp_path / "small") == [1, 2]
    assert [bool(text) for text in said] == [False, False, True, False, False]
    assert "record.max_mb=0.001: no conversations are written from step 3 on" in said[2]


def test_two_runs_in_one_folder_keep_their_files_whole(tmp_path: Path) -> None:
    """Also when one of them starts over or is resumed."""
    runs = [RunSection(dir=tmp_path, name=name) for name in ("a", "b")]
    for run in runs:
        written = RecordWriter(run.conversations_dir, PLAIN, first_step=1)
        for step in (1, 2, 3):
            written.write(step, [line(step, run.name)])
            append_evaluation(run.evaluations_file, step, {"mr": 0.5})
    a, b = runs
    RecordWriter(a.conversations_dir, PLAIN, first_step=2)
    drop_evaluations(a.evaluations_file, first=2)
    assert steps(a.conversations_dir) == [1]
    assert [(tree["step"], tree["text"]) for tree in read_trees(b.conversations_dir)] == [(1, "b"), (2, "b"), (3, "b")]
    evaluated = [[json.loads(row)["step"] for row in run.evaluations_file.read_text().splitlines()] for run in runs]
    assert evaluated == [[1], [1, 2, 3]]
    assert a.engine_probe_file != b.engine_probe_file
    assert a.weights_dir != b.weights_dir


def test_a_disk_that_refuses_ends_the_step_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = RecordWriter(tmp_path, PLAIN, first_step=1)

    def refuse(*_: object, **__: object) -> object:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(RunError, match="No space left on device"):
        full.write(1, [line(1)])
