"""Several processes with one journal, and processes that are killed: what was reported as committed is there."""

from __future__ import annotations

import contextlib
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from collab_megatron.rollout.journal.store import Journal, Spent
from tests.conftest import REPOSITORY
from tests.rollout.journal.samples import key, reply, turn

pytestmark = pytest.mark.slow

KILLS = 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.sqlite"


STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def _ended() -> Iterator[None]:
    """A test that fails leaves no writer behind."""
    yield
    for process in STARTED:
        process.kill()
        process.wait(10)
    STARTED.clear()


def writer(path: Path, name: str, *more: object, said: Path | None = None) -> subprocess.Popen[str]:
    """Its lines go to the file `said`, or to its pipe."""
    argv = [sys.executable, "-m", "tests.rollout.journal.writer", str(path), name, *map(str, more)]
    with contextlib.ExitStack() as stack:
        out = subprocess.PIPE if said is None else stack.enter_context(said.open("w"))
        STARTED.append(subprocess.Popen(argv, cwd=REPOSITORY, stdout=out, stderr=subprocess.PIPE, text=True))
    return STARTED[-1]


def test_two_processes_write_and_read_one_file(path: Path) -> None:
    """They also make it at the same moment."""
    count = 1500
    writers = [writer(path, name, count) for name in ("a", "b")]
    ended = [process.communicate(timeout=60) for process in writers]
    assert [process.returncode for process in writers] == [0, 0], ended
    with closing(Journal(path, replay="only", lineage="one")) as journal:
        assert journal.spent() == {(name, "model-a"): Spent(count, count * 0.5) for name in ("a", "b")}
        for name in ("a", "b"):
            for i in range(count):
                assert journal.reply(key((name, i))) == reply(f"{name} {i}", cost_usd=0.5)
                assert journal.turn(key((name, i)), oldest=i, newest=i) == (turn(i, tokens=20),)


def test_a_process_sees_what_another_one_has_just_recorded(path: Path) -> None:
    with closing(Journal(path, replay="auto", lineage="one")) as journal:
        assert journal.reply(key(("a", 0))) is None
        process = writer(path, "a", 0)
        try:
            assert process.stdout is not None
            for i in range(50):
                assert process.stdout.readline() == f"{i}\n"
                assert journal.reply(key(("a", i))) == reply(f"a {i}", cost_usd=0.5)
        finally:
            process.kill()
            process.communicate()


def test_what_a_killed_process_had_committed_is_there(path: Path) -> None:
    """Killed at random moments, two at a time, with the same file; checkpoints are among them."""
    rng = random.Random(5)
    said = {name: path.with_name(name) for kill in range(KILLS // 2) for name in (f"a-{kill}", f"b-{kill}")}
    for kill in range(KILLS // 2):
        processes = [writer(path, name, 0, said=said[name]) for name in (f"a-{kill}", f"b-{kill}")]
        deadline = time.monotonic() + 30
        while not (said[f"a-{kill}"].stat().st_size and said[f"b-{kill}"].stat().st_size):  # both are at work
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.6))
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate(timeout=10)
    expected = {name: len(file.read_text().splitlines()) for name, file in said.items()}
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    with closing(Journal(path, replay="only", lineage="one")) as journal:
        spent = journal.spent()
        for name, count in expected.items():
            assert count <= spent[name, "model-a"].calls <= count + 1  # the last one was not reported any more
            for i in range(count):
                assert journal.reply(key((name, i))) == reply(f"{name} {i}", cost_usd=0.5)
                assert journal.turn(key((name, i)), oldest=i, newest=i) is not None
    assert sum(expected.values()) > 200


def test_a_disk_that_is_full_ends_the_run_and_keeps_what_there_is(path: Path) -> None:
    process = writer(path, "a", 0, 1_000_000)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    failed = f"the journal {path} cannot be read or written (disk I/O error)", f"the disk of the journal {path} is full"
    assert errors.startswith(tuple(f"error: {words}: " for words in failed)), errors
    count = len(said.splitlines())
    assert count > 20
    with closing(Journal(path, replay="only", lineage="one")) as journal:
        for i in range(count):
            assert journal.reply(key(("a", i))) is not None
            assert journal.turn(key(("a", i)), oldest=i, newest=i) is not None
        journal.record_reply(key("more"), "a", reply())


def test_another_process_that_holds_the_file_for_too_long_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("collab_megatron.rollout.journal.database.BUSY_S", 0.2)
    with (
        closing(Journal(path, replay="auto", lineage="one")) as journal,
        closing(sqlite3.connect(path, isolation_level=None)) as other,
    ):
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Exception, match=r"was locked by another process for 0\.2 s"):
            journal.record_reply(key(1), "a", reply())
        other.execute("ROLLBACK")
        journal.record_reply(key(1), "a", reply())
        assert journal.reply(key(1)) == reply()
