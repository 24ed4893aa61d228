"""The table of bad inputs: each ends with its exit code and one sentence that names the key, without a traceback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.config import rows_engine, rows_model, rows_places, rows_tools, rows_values, rows_yaml
from tests.config.sound import write_world
from tests.config.table import MODULES, Row, World, command_of, require_one_sentence, run_here
from tests.conftest import DESK_KEY, REPOSITORY

ROWS = (
    *rows_yaml.ROWS,
    *rows_values.ROWS,
    *rows_model.ROWS,
    *rows_engine.ROWS,
    *rows_places.ROWS,
    *rows_tools.ROWS,
)
IMPORT_SGLANG = frozenset({"sglang-unknown-flag"})
FEWEST = 150
AS_A_PROCESS = ("bool-lr", "duplicate-key", "truncated-weights", "run-name-slash", "show-a-folder")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[World]:
    """Sound configs whose LLM services answer a connection and nothing else."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        yield write_world(tmp_path_factory.mktemp("world"), tiny_model, listener.getsockname()[1])


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DESK_API_KEY", DESK_KEY)


def test_the_table_is_long_and_names_each_row_once() -> None:
    names = [row.name for row in ROWS]
    assert len(names) == len(set(names))
    assert len(names) >= FEWEST
    assert set(AS_A_PROCESS) <= set(names)


@pytest.mark.parametrize("program", ["train_rl", "train_sft", "train_dpo", "evaluate", "build"])
def test_what_the_rows_change_is_sound(
    world: World, program: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it every row would pass for a reason of its own."""
    said = run_here(program, command_of(Row("sound", program, (), ()), world, tmp_path), capsys)
    assert said.code == 0, said.err


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.name, marks=[pytest.mark.slow] * (row.name in IMPORT_SGLANG)) for row in ROWS]
)
def test_a_bad_input_is_one_sentence(
    row: Row, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require_one_sentence(row, run_here(row.program, command_of(row, world, tmp_path), capsys))


@pytest.mark.parametrize("name", AS_A_PROCESS)
def test_a_bad_input_ends_the_command_too(name: str, world: World, tmp_path: Path) -> None:
    """As the shell sees it."""
    row = next(row for row in ROWS if row.name == name)
    done = subprocess.run(
        [sys.executable, "-m", MODULES[row.program], *command_of(row, world, tmp_path)],
        cwd=REPOSITORY,
        env={**os.environ, "DESK_API_KEY": DESK_KEY},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == row.code
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert all(piece.lower() in line.lower() for piece in row.says)
