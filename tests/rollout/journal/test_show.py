"""The journal as a table for people."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from collab_megatron.rollout.journal.store import Journal
from collab_megatron.run_order import POSITION, RunPosition
from tests.conftest import Run
from tests.rollout.journal.samples import key, reply, turn


def test_show_prints_steps_and_totals_of_a_journal_in_use(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "run #1?.sqlite"  # characters that a URI would read
    with closing(Journal(path, replay="auto", lineage="one")) as journal:
        journal.record_reply(key("old"), "user", reply(cost_usd=2.0))
        journal.record_turn(key("old"), [turn(tokens=4), turn(tokens=5)])
        token = POSITION.set(RunPosition(3))
        for i in range(1200):
            journal.record_reply(key(i), "user", reply(cost_usd=0.001))
        journal.record_reply(key("judge"), "judge", reply(model=""))
        POSITION.reset(token)
        journal.record_delivery(0, 3, b"x" * 20_000)
        shown = run("-m", "collab_megatron.rollout.journal.show", str(path))
        journal.record_reply(key("more"), "user", reply())  # showing it took nothing from the run
    assert shown.output.splitlines() == [
        "step     1  user (model-a): 1 replies, $2.0000, mean 0.50 s, 10 + 3 tokens",
        "step     1  policy: 1 requests, 2 turns, 9 tokens",
        "step     4  judge (model not named): 1 replies, $0.2500, mean 0.50 s, 10 + 3 tokens",
        "step     4  user (model-a): 1,200 replies, $1.2000, mean 0.50 s, 12,000 + 3,600 tokens",
        "step     4  delivered by 1 shards, 0.02 MB",
        "whole run   judge (model not named): 1 replies, $0.2500",
        "whole run   user (model-a): 1,201 replies, $3.2000",
    ]
    assert shown.code == 0
    assert run("-m", "collab_megatron.rollout.journal.show", str(path)).code == 0  # with nobody else there


def test_show_says_what_it_cannot_show(run: Run, tmp_path: Path) -> None:
    missing = run("-m", "collab_megatron.rollout.journal.show", str(tmp_path / "none.sqlite"))
    assert (missing.code, len(missing.errors)) == (2, 1)
    (tmp_path / "text").write_text("x" * 5000)
    other = run("-m", "collab_megatron.rollout.journal.show", str(tmp_path / "text"))
    assert other.code == 2
    assert "is not an SQLite file" in other.errors[0]
