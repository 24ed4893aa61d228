"""Records that grow: whole lines alone, a torn end cut and counted, a bad line told by its number."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from collab_megatron import json_lines
from collab_megatron.errors import UserError
from collab_megatron.json_lines import Rows, append_lines, append_rows, keep_rows, read_rows, replace_lines

ONE, TWO = {"step": 1, "text": "a"}, {"step": 2, "text": "\u2028 \U0001f600"}
LINES = b'{"step": 1, "text": "a"}\n{"step": 2, "text": "\\u2028 \\ud83d\\ude00"}\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    append_rows(tmp_path / "record.jsonl", [ONE, TWO])
    return tmp_path / "record.jsonl"


def test_what_is_appended_is_read(file: Path) -> None:
    assert file.read_bytes() == LINES
    assert read_rows(file, numbers=["step"]) == Rows([ONE, TWO])
    assert read_rows(file.with_name("none.jsonl")) == Rows([])


def test_an_end_torn_at_any_byte_is_left_out_and_cut_by_the_next_append(file: Path) -> None:
    first, second = LINES.splitlines(keepends=True)
    for length in range(len(second)):
        whole = length == len(second) - 1  # an object that lacks its line's end alone loses nothing
        file.write_bytes(first + second[:length])
        rows = [ONE, TWO] if whole else [ONE]
        assert read_rows(file) == Rows(rows, 0 if whole else length)
        append_rows(file, [{"step": 3}])
        assert read_rows(file) == Rows([*rows, {"step": 3}])


def test_a_torn_end_longer_than_a_block_is_cut(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "BLOCK_BYTES", 7)
    file.write_bytes(LINES + b'{"text": "' + b"x" * 100)
    append_rows(file, [ONE])
    assert read_rows(file).rows == [ONE, TWO, ONE]
    file.write_bytes(b"\0" * 100)  # after a power failure
    append_rows(file, [ONE])
    assert read_rows(file) == Rows([ONE])


@pytest.mark.parametrize("bad", [b"{", b"[1]", b"\xff", b"[" * 10_000, b"0"])
def test_a_bad_line_in_the_middle_is_one_sentence(file: Path, bad: bytes) -> None:
    file.write_bytes(LINES + bad + b"\n" + LINES)
    with pytest.raises(UserError, match=r"record\.jsonl: line 3 is not a JSON object .*: remove that line") as caught:
        read_rows(file)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("row", ["{}", '{"step": "1"}', '{"step": true}', '{"step": null}'])
def test_a_line_without_its_number_is_one_sentence(file: Path, row: str) -> None:
    file.write_text(row + "\n" + row + "\n")
    with pytest.raises(UserError, match=r"line 1 has no number 'step'"):
        read_rows(file, numbers=["step"])
    assert len(read_rows(file).rows) == 2


def test_rows_are_taken_out_with_the_torn_end(file: Path) -> None:
    file.write_bytes(LINES + b'{"step": 3')
    keep_rows(file, lambda row: row["step"] > 1)
    assert file.read_bytes() == LINES.splitlines(keepends=True)[1]
    before = file.stat().st_ino
    keep_rows(file, lambda row: True)
    assert file.stat().st_ino == before  # nothing to take out: not written again
    keep_rows(file.with_name("none.jsonl"), lambda row: True)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_disk_that_fills_up_in_the_middle_of_a_line_leaves_whole_lines(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.write, list[int]()

    def half(descriptor: int, data: bytes) -> int:
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, bytes(data)[: len(data) // 2])

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match="No space left"):
        append_lines(file, LINES)
    assert len(calls) == 2
    assert file.read_bytes() == LINES


def test_what_replaces_a_file_is_whole_or_not_there(file: Path) -> None:
    def broken():
        yield b"{}\n"
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        replace_lines(file, broken())
    assert file.read_bytes() == LINES
    replace_lines(file, [b"{}\n"])
    assert read_rows(file) == Rows([{}])
