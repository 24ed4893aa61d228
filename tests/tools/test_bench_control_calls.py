"""tools/bench/control_calls.py on one real server: rows and errors; no speeds, no smg."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.config.table import run_main
from tests.conftest import Run
from tools.bench import control_calls

TOOL = "tools/bench/control_calls.py"
TOOL_S = 280.0
CALLS = ["pause_generation", "begin_weight_update", "end_weight_update", "flush_cache", "continue_generation"]
HEAD = {"call", "way", "servers"}


@pytest.mark.slow
@pytest.mark.full
def test_a_row_for_every_call(tmp_path: Path, run: Run) -> None:
    output = tmp_path / "rows.json"
    done = run(TOOL, "--servers", "1", "--repeats", "2", "--json", str(output), timeout_s=TOOL_S)
    assert done.code == 0, done.output
    rows = json.loads(output.read_text())
    assert [(row["way"], row["call"]) for row in rows] == [
        (way, call) for way in ("direct", "smg") for call in (*CALLS, "all")
    ]
    assert len(done.output.splitlines()) == len(rows)  # and nothing else was said
    for row in rows:
        assert row["servers"] == 1
        if row["way"] == "smg":
            assert set(row) == HEAD | {"skipped"}
            assert "--smg" in row["skipped"]
            continue
        assert set(row) == HEAD | {"repeats", "seconds", "fastest_seconds", "slowest_seconds"}
        assert row["repeats"] == 2
        assert 0 < row["fastest_seconds"] <= row["seconds"] <= row["slowest_seconds"]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--servers", "0"], "--servers"),
        (["--repeats", "0"], "--repeats"),
        (["--smg", "/no/such/file"], "/no/such/file"),
    ],
)
def test_mistakes_end_with_2(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    done = run_main(control_calls.main, [TOOL, *arguments], capsys)
    assert done.code == 2
    assert says in done.err
