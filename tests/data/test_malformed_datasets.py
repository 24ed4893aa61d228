"""Malformed datasets, drawn by hypothesis: tools/prepare_dataset.py ends with a clear sentence or a counted skip, and
with a file that reads back; never with another exception."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from collab_megatron.data.parquet import read_conversations, read_pairs, read_tasks
from collab_megatron.data.prepare import KINDS, Kind, prepare
from collab_megatron.errors import UserError
from tests.conftest import REPOSITORY
from tests.data.test_datasets import flat, turn

READ: dict[Kind, Any] = {"rl": read_tasks, "sft": read_conversations, "dpo": read_pairs}
LONGEST_SENTENCE = 4000
TWO_MB = "x" * 2**21
SOUND = [flat(conv, 0, f"reply {number}", float(number)) for conv in range(2) for number in range(2)]
COLUMNS = (*SOUND[0], "turns", "messages", "task_desc", "ground_truth")

# what stands where something else belongs
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([10**400, -(10**400), float("inf"), float("nan"), "\ud83d", "a\udc00b", "", " ", "{", "[1", "\0"])
    | st.floats()
    | st.text(st.characters(), max_size=8),  # surrogates included
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
turns = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "User", ""]) | json_values},
    optional={"content": st.text(max_size=6) | json_values, "name": json_values},
)
chats = st.lists(turns | json_values, max_size=4)
responses = st.fixed_dictionaries({}, optional={"completion": json_values, "score": json_values, "sessions": chats})
nested = st.lists(
    st.fixed_dictionaries({}, optional={"prompt": chats, "responses": st.lists(responses | json_values, max_size=2)})
    | json_values,
    max_size=2,
)
numbered = st.dictionaries(
    st.sampled_from(["0", "1", "x"]),
    st.fixed_dictionaries({}, optional={"forward_chat": chats, "average_score": json_values, "m": json_values}),
    max_size=2,
)
wrong_values = st.one_of(json_values, chats, nested, numbered)
changes = st.dictionaries(st.sampled_from(COLUMNS), wrong_values, max_size=3)
missing = st.sets(st.sampled_from(COLUMNS), max_size=3)


@st.composite
def spoiled_rows(draw: st.DrawFn) -> list[Any]:
    """Sound rows, some of them changed, shortened, repeated or replaced."""
    rows: list[Any] = []
    for row in draw(st.lists(st.sampled_from(SOUND), min_size=1, max_size=4)):
        spoiled = {**row, **draw(changes)}
        rows.append({name: value for name, value in spoiled.items() if name not in draw(missing)})
    rows += draw(st.lists(wrong_values, max_size=1))
    if draw(st.booleans()):
        rows += SOUND
    return rows


def end_of(kind: Kind, source: Path, folder: Path, *, skip: bool) -> str:
    """The sentence that `prepare` ends with; empty if it wrote a file, which then reads back with as many rows."""
    try:
        written = prepare(kind, str(source), folder / "out", validation_share=0, skip_bad_rows=skip)
    except UserError as error:
        sentence = str(error)
        assert 20 < len(sentence) < LONGEST_SENTENCE, sentence[:200]
        return sentence
    for part in written:
        assert len(READ[kind](part.path)) == part.rows_written
    return ""


def require_the_fault(sentence: str, kind: Kind, rows: int) -> None:
    """It names rows by number, or the columns that no row has; or no row is bad, and there is nothing to pair."""
    numbers = [int(number) for number in re.findall(r"/rows\.jsonl: row (\d+)(?: |: )", sentence)]
    assert all(1 <= number <= rows for number in numbers), sentence
    columns = re.findall(r"(?:has no columns? |, )'(\w+)'", sentence)
    nothing = kind == "dpo" and re.match(r"no turn makes a pair \(left out: \d+ of \d+ turns", sentence)
    assert numbers or (columns and set(columns) <= set(COLUMNS)) or nothing, sentence


def written_as(rows: list[Any], path: Path) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    return path


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(spoiled_rows(), st.sampled_from(KINDS), st.booleans())
@example([{**SOUND[0], "score": 10**400}, *SOUND], "dpo", True)
@example([{**SOUND[0], "turn_id": 1e300}, *SOUND], "sft", False)
@example([{**SOUND[0], "single_turn_metadata": "[" * 100_000}, *SOUND], "rl", True)
@example([{**SOUND[0], "single_turn_metadata": {"x": ["\ud83d"]}}, *SOUND], "rl", True)
@example([{**SOUND[0], "conv_id": "\ud83d"}, *SOUND], "sft", True)
@example([{**SOUND[0], "sessions": {"0": {"average_score": "high"}}, "rewards": None}, *SOUND], "rl", True)
@example([{**SOUND[0], "prompt": [turn("user", TWO_MB)]}, {**SOUND[1], "completion": TWO_MB}], "dpo", False)
@example([SOUND[0], SOUND[0], {**SOUND[0], "conv_id": SOUND[1]["conv_id"]}], "sft", False)
@example([{**SOUND[0], "turns": [{"prompt": None, "responses": [{"completion": None}]}]}, *SOUND], "rl", True)
@example([{**SOUND[0], "turns": [{"responses": None}, None]}, *SOUND], "dpo", True)
@pytest.mark.slow
def test_rows_of_any_kind_end_in_a_sentence_or_a_file(rows: list[Any], kind: Kind, skip: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = written_as(rows, Path(folder) / "rows.jsonl")
        sentence = end_of(kind, source, Path(folder), skip=skip)
        if sentence:
            require_the_fault(sentence, kind, len(rows))


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["rows.jsonl", "rows.json", "rows.parquet"]), st.booleans())
@example(b'{"a": 1}\n\xff\xfe{"a": 2}\n', "rows.jsonl", True)
@example(b"[" * 200_000, "rows.json", False)
@example(b"PAR1" + b"\0" * 40 + b"PAR1", "rows.parquet", False)
@example(b"1" * 5000, "rows.jsonl", False)
@example(b"1" * 5000, "rows.json", False)
def test_bytes_of_any_kind_end_in_a_sentence(content: bytes, name: str, skip: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / name
        source.write_bytes(content)
        assert end_of("rl", source, Path(folder), skip=skip)


@pytest.mark.parametrize("kind", KINDS)
def test_skipped_rows_are_counted(kind: Kind, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = [
        {**SOUND[0], "prompt": [turn("user", "")]},
        {**SOUND[0], "completion": "\ud83d"},
        {**SOUND[0], "single_turn_metadata": {"x": "\ud83d"}},
        {**SOUND[0], "conv_id": None},
        {**SOUND[0], "turns": [{"prompt": SOUND[0]["prompt"], "responses": [None]}]},
        7,
    ]
    source = tmp_path / "rows.jsonl"
    text = "\n".join(map(json.dumps, [*broken, *SOUND]))
    source.write_bytes(b"\xef\xbb\xbf" + text.encode() + b'\n{"x": "\xff"}\n{"half": ')  # a BOM, no UTF-8, a torn line
    assert end_of(kind, source, tmp_path, skip=True) == ""
    assert "skipped 8 of 12 rows: " in capsys.readouterr().out
    assert "line 11 is not UTF-8" in end_of(kind, source, tmp_path, skip=False)


@pytest.mark.slow
def test_what_is_printed_can_be_shown_on_any_terminal(tmp_path: Path) -> None:
    """Half a surrogate pair in the name of a column or metric: a strict stdout would raise."""
    odd = {"\ud83d": 1}
    source = written_as([{**odd, "prompt": 1}, {**SOUND[0], "rewards": {"\ud83d": 1.0}}], tmp_path / "rows.jsonl")
    tool = [sys.executable, "tools/prepare_dataset.py", "--dataset", str(source), "--dataset-type", "rl"]
    more = ["--output", str(tmp_path / "out"), "--validation-share", "0", "--on-error", "skip"]
    done = subprocess.run([*tool, *more], cwd=REPOSITORY, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert b"skipped 1 of 2 rows" in done.stdout


def test_parquet_values_that_json_lacks_become_text(tmp_path: Path) -> None:
    """Dates, bytes and decimals of a hub's dataset."""
    when = datetime(2024, 5, 1, tzinfo=UTC)
    rows = [{**row, "single_turn_metadata": {"when": when, "raw": b"\xff", "n": 3}} for row in SOUND]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert end_of("rl", tmp_path / "rows.parquet", tmp_path, skip=False) == ""
    metadata = read_tasks(tmp_path / "out" / "rl_train.parquet")[0].metadata
    assert metadata == {"when": "2024-05-01 00:00:00+00:00", "raw": "b'\\xff'", "n": 3}


@pytest.mark.parametrize("column", [pa.array([["a"]]), pa.array([1]), pa.array([None]), pa.array([b"\xff"])])
def test_parquet_columns_of_another_type_are_named(column: Any, tmp_path: Path) -> None:
    table = pa.Table.from_pylist(SOUND[:1])
    for name in ("prompt", "completion", "single_turn_prompt"):
        spoiled = table.set_column(table.column_names.index(name), name, column)
        pq.write_table(spoiled, tmp_path / "rows.parquet")
        assert name in end_of("rl", tmp_path / "rows.parquet", tmp_path, skip=False)
