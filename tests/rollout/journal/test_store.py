"""One process with its journal: what is found, under which conditions, what it costs, and what is removed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal

import pytest

from collab_megatron.errors import UserError
from collab_megatron.rollout.journal import housekeeping
from collab_megatron.rollout.journal.store import Journal, ReplayMiss, Spent
from collab_megatron.run_order import POSITION, RunPosition
from tests.rollout.journal.samples import key, reply, turn


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal" / "run.sqlite"


@contextmanager
def opened(path: Path, *, replay: Literal["auto", "only", "off"] = "auto", lineage: str = "one") -> Iterator[Journal]:
    with closing(Journal(path, replay=replay, lineage=lineage)) as journal:
        yield journal


@contextmanager
def at_step(step: int) -> Iterator[None]:
    token = POSITION.set(RunPosition(step))
    try:
        yield
    finally:
        POSITION.reset(token)


def test_a_reply_is_found_again_by_its_key_and_under_any_lineage(path: Path) -> None:
    with opened(path) as journal:
        assert journal.reply(key(1)) is None
        journal.record_reply(key(1), "user", reply("as it \ud800 was"))
        assert journal.reply(key(1)) == reply("as it \ud800 was")
        assert journal.reply(key(2)) is None
    with opened(path, lineage="two") as journal:
        assert journal.reply(key(1)) == reply("as it \ud800 was")


def test_the_last_of_two_replies_counts_and_both_were_paid_for(path: Path) -> None:
    with opened(path) as journal:
        journal.record_reply(key(1), "user", reply("first"))
        journal.record_reply(key(1), "user", reply("second"))
        assert journal.reply(key(1)) == reply("second")
        assert journal.spent() == {("user", "model-a"): Spent(2, 0.5)}
        assert journal.metrics()["journal/rows"] == 1


def test_spend_is_kept_by_role_and_model_over_restarts(path: Path) -> None:
    with opened(path) as journal:
        assert journal.spent() == {}
        for i in range(3):
            journal.record_reply(key(i), "user", reply(cost_usd=0.5))
        journal.record_reply(key(3), "judge", reply(cost_usd=1.0))
    with opened(path, replay="off", lineage="two") as journal:
        journal.record_reply(key(4), "user", reply(cost_usd=2.0, model="\ud800"))
        assert journal.spent() == {
            ("user", "model-a"): Spent(3, 1.5),
            ("judge", "model-a"): Spent(1, 1.0),
            ("user", "\\ud800"): Spent(1, 2.0),
        }


@pytest.mark.parametrize("oldest, newest, found", [(5, 5, True), (0, 9, True), (6, 9, False), (0, 4, False)])
def test_a_turn_is_found_by_the_versions_that_sampled_it(path: Path, oldest: int, newest: int, found: bool) -> None:
    with opened(path) as journal:
        journal.record_turn(key(1), [turn(5), turn(5)])
        assert journal.turn(key(1), oldest=oldest, newest=newest) == ((turn(5), turn(5)) if found else None)


def test_a_turn_of_several_versions_needs_all_of_them_in_range(path: Path) -> None:
    with opened(path) as journal:
        journal.record_turn(key(1), [turn(4), turn(6)])
        assert journal.turn(key(1), oldest=4, newest=5) is None
        assert journal.turn(key(1), oldest=5, newest=6) is None
        assert journal.turn(key(1), oldest=4, newest=6) == (turn(4), turn(6))


def test_of_several_turns_the_one_of_the_newest_allowed_weights_is_found(path: Path) -> None:
    with opened(path) as journal:
        for version in (6, 4, 5):
            journal.record_turn(key(1), [turn(version)])
        assert journal.turn(key(1), oldest=0, newest=9) == (turn(6),)
        assert journal.turn(key(1), oldest=0, newest=5) == (turn(5),)


def test_turns_and_deliveries_belong_to_their_lineage(path: Path) -> None:
    with opened(path) as journal:
        journal.record_turn(key(1), [turn()])
        journal.record_delivery(0, 7, b"\0batch")
        assert journal.delivered(0, 7) == b"\0batch"
        assert journal.delivered(0, 8) is None
        assert journal.delivered(1, 7) is None
    with opened(path, lineage="two") as journal:
        assert journal.turn(key(1), oldest=0, newest=9) is None
        assert journal.delivered(0, 7) is None


def test_a_turn_without_tokens_is_of_no_version(path: Path) -> None:
    with opened(path) as journal:
        journal.record_turn(key(1), [turn(tokens=0)])
        assert journal.turn(key(1), oldest=-1, newest=9) is None


def test_off_finds_nothing_counts_nothing_and_records(path: Path) -> None:
    with opened(path, replay="off") as journal:
        journal.record_reply(key(1), "user", reply())
        journal.record_turn(key(1), [turn()])
        journal.record_delivery(0, 0, b"x")
        assert journal.reply(key(1)) is None
        assert journal.turn(key(1), oldest=0, newest=9) is None
        assert journal.delivered(0, 0) is None
        assert (figures := journal.metrics())["journal/rows"] == 3
        assert figures["journal/hits"] == figures["journal/misses"] == 0
    with opened(path) as journal:
        assert journal.reply(key(1)) == reply()


def test_only_says_what_it_lacks(path: Path) -> None:
    with opened(path) as journal:
        journal.record_reply(key(1), "user", reply())
    with opened(path, replay="only") as journal, at_step(12):
        assert journal.replay == "only"
        assert journal.reply(key(1)) == reply()
        with pytest.raises(ReplayMiss, match=r"a reply of judge of step 13, and journal\.replay is only"):
            journal.reply(key(2), what="a reply of judge")
        with pytest.raises(ReplayMiss, match="does not have a policy turn of step 13"):
            journal.turn(key(1), oldest=0, newest=9)
        assert journal.delivered(0, 12) is None


def test_only_needs_a_journal(path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no journal .*run\.sqlite: set journal\.path"):
        Journal(path, replay="only", lineage="")
    assert not path.exists()


def test_metrics_count_look_ups_and_growth_since_the_last_call(path: Path) -> None:
    with opened(path) as journal:
        for i in range(200):
            journal.record_reply(key(i), "user", reply("x" * 1000))
        journal.reply(key(0))
        journal.turn(key(0), oldest=0, newest=0)
        journal.reply(key(-1))
        figures = journal.metrics()
        assert (figures["journal/rows"], figures["journal/hits"], figures["journal/misses"]) == (200, 1, 2)
        assert 0.2 < figures["journal/grown_mb"] <= figures["journal/mb"]
        figures = journal.metrics()
        assert (figures["journal/hits"], figures["journal/misses"]) == (0, 0)
        assert figures["journal/grown_mb"] < 0.5


@pytest.mark.slow
def test_pruning_removes_older_steps_and_gives_their_space_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for batch in ("BATCH_ROWS", "BATCH_PAGES"):
        monkeypatch.setattr(housekeeping, batch, 300)
    monkeypatch.setattr(housekeeping, "BATCH_PAUSE_S", 0.2)  # smaller batches than these would need a minute
    with opened(path) as journal:
        for step in (0, 1, 2):
            with at_step(step):
                for i in range(700):
                    journal.record_reply(key((step, i)), "user", reply("x" * 1000, cost_usd=0.5))
                    journal.record_turn(key((step, i)), [turn(step, tokens=50)])
                journal.record_delivery(0, step, b"x" * 100_000)
        spent = journal.spent()
        journal.prune(before_step=2)
        deadline = time.monotonic() + 30
        while (figures := journal.metrics())["journal/rows"] > 1401 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert figures["journal/rows"] == 1401
        assert journal.reply(key((1, 699))) is None
        assert journal.turn(key((1, 699)), oldest=0, newest=9) is None
        assert journal.delivered(0, 1) is None
        assert journal.reply(key((2, 0))) is not None
        assert journal.turn(key((2, 0)), oldest=0, newest=9) is not None
        assert journal.delivered(0, 2) is not None
        assert journal.spent() == spent == {("user", "model-a"): Spent(2100, 1050.0)}
        # three steps took about 6.5 MB
        while path.stat().st_size > 3_000_000 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert path.stat().st_size < 3_000_000


def test_what_was_written_leaves_the_log_beside_the_run(path: Path) -> None:
    with opened(path) as journal:
        journal.record_delivery(0, 0, b"x" * 500_000)
        assert path.stat().st_size < 500_000
        deadline = time.monotonic() + 10
        while path.stat().st_size < 500_000 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert path.stat().st_size > 500_000


@pytest.mark.slow
def test_a_log_that_is_written_to_all_the_time_stays_short(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(housekeeping, "TICK_S", 0.02)
    monkeypatch.setattr(housekeeping, "MAX_LOG_PAGES", 200)
    log, longest, written = path.with_name(path.name + "-wal"), 0, 0
    with opened(path) as journal:
        deadline = time.monotonic() + 60
        while written < max(20e6, 3 * longest):  # a log that never starts over is longer than what was written
            assert time.monotonic() < deadline, f"a log of {longest} bytes after writes of {written}"
            journal.record_delivery(0, 0, b"x" * 10_000)  # one row over and over: nothing but the log grows
            written += 10_000
            longest = max(longest, log.stat().st_size)


def test_closing_leaves_one_file(path: Path) -> None:
    with opened(path) as journal:
        journal.record_reply(key(1), "user", reply())
    assert [file.name for file in path.parent.iterdir()] == ["run.sqlite"]
