"""Files that are not a journal, or a damaged one: a sentence with what to do."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from collab_megatron.errors import RunError, UserError
from collab_megatron.rollout.journal.database import SCHEMA_VERSION
from collab_megatron.rollout.journal.store import Journal
from tests.rollout.journal.samples import key, reply, turn


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.sqlite"


def open_and_close(path: Path) -> None:
    Journal(path, replay="auto", lineage="one").close()


def change(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(statement)
        connection.commit()


@pytest.mark.parametrize("content", [b"step,reward\n" * 100, b"{}"])
def test_no_sqlite_file(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"run\.sqlite is not an SQLite file: move it away, or set journal\.path"):
        open_and_close(path)
    assert path.read_bytes() == content


def test_an_empty_file_and_another_program_s_database(path: Path) -> None:
    path.touch()
    with pytest.raises(UserError, match="is an SQLite file but not a journal: move it away"):
        open_and_close(path)
    change(path, "CREATE TABLE things (name TEXT)")
    with pytest.raises(UserError, match="is an SQLite file but not a journal: move it away"):
        open_and_close(path)


def test_a_newer_version_s_journal(path: Path) -> None:
    open_and_close(path)
    change(path, f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    with pytest.raises(UserError, match=r"is of a newer version \(2; this one reads 1\): update collab_megatron"):
        open_and_close(path)


def test_a_place_that_cannot_hold_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot create the journal .*: set journal\.path"):
        open_and_close(tmp_path / "file" / "run.sqlite")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot open the journal"):
        open_and_close(tmp_path / "folder")


def test_a_damaged_file(path: Path) -> None:
    with closing(Journal(path, replay="auto", lineage="one")) as journal:
        for i in range(300):
            journal.record_reply(key(i), "user", reply("x" * 500))
    content = bytearray(path.read_bytes())
    content[4096 * 2 :] = b"\xa5" * (len(content) - 4096 * 2)
    path.write_bytes(content)
    journal = Journal(path, replay="auto", lineage="one")
    with pytest.raises(RunError, match="is damaged: move it away; the run then asks again"):
        for i in range(300):
            journal.reply(key(i))
    with pytest.raises(RunError, match="is damaged: move it away"):
        journal.record_reply(key(1), "user", reply())
    journal.close()


def test_a_row_whose_content_is_damaged(path: Path) -> None:
    with closing(Journal(path, replay="auto", lineage="one")) as journal:
        journal.record_turn(key(1), [turn()])
        change(path, "UPDATE turns SET content = x'00ff'")
        with pytest.raises(RunError, match="is damaged: move it away"):
            journal.turn(key(1), oldest=0, newest=9)


def test_a_full_disk(path: Path) -> None:
    with closing(Journal(path, replay="auto", lineage="one")) as journal:
        journal.record_reply(key(1), "user", reply())
        (pages,) = journal._read("PRAGMA page_count")[0]
        journal._read(f"PRAGMA max_page_count = {pages + 2}")
        with pytest.raises(RunError, match=r"the disk of the journal .*run\.sqlite is full: free some space"):
            journal.record_delivery(0, 0, b"x" * 100_000)
        assert journal.delivered(0, 0) is None
        journal._read("PRAGMA max_page_count = 100000")
        journal.record_delivery(0, 0, b"x" * 100_000)
        assert journal.reply(key(1)) == reply()


def test_a_failure_beside_the_run_is_raised_by_the_next_record(path: Path) -> None:
    """Damage that only the pruning meets."""
    journal = Journal(path, replay="auto", lineage="one")
    for i in range(300):
        journal.record_reply(key(i), "user", reply("x" * 500))
    change(path, "DROP TABLE turns")
    journal.prune(before_step=1)
    deadline = time.monotonic() + 10
    with pytest.raises(RunError, match="cannot be read or written"):
        while time.monotonic() < deadline:
            journal.record_reply(key(0), "user", reply())
            time.sleep(0.05)
    journal.close()
