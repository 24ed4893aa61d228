"""Training files with unusable rows: all rows are checked, and the error has their numbers from 1."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from collab_megatron.data.parquet import Conversation, read_conversations, read_tasks, write_conversations, write_tasks
from collab_megatron.errors import UserError
from collab_megatron.types import Message, Task


@pytest.mark.parametrize(
    ("column", "value", "complaint"),
    [
        ("single_turn_prompt", None, "single_turn_prompt is null, but must be text"),
        ("single_turn_prompt", " ", "single_turn_prompt is empty"),
        ("ground_truth", None, "ground_truth is null"),
        ("task_id", None, "task_id is null"),
        ("task_id", "", "task_id is empty"),
        ("prompt", None, "prompt is null: a chat is a list"),
        ("prompt", [], "prompt is empty: a chat is a list"),
        ("prompt", [None], "(content|role) is null, but must be text"),
        (
            "prompt",
            [{"role": "user", "content": None}],
            "prompt has a turn whose content is null, but must be text",
        ),
        ("prompt", [{"role": None, "content": "a"}], "prompt has a turn whose role is null|prompt has a role"),
        ("prompt", [{"role": "users", "content": "a"}], "prompt has a role that is none of system, user, assistant"),
        ("prompt", [{"role": "user", "content": " "}], "prompt ends with an empty turn"),
        ("prompt", [{"role": "assistant", "content": "a"}], "prompt must end with a user turn"),
        ("prompt", [{"role": "user", "content": "y"}], "task_id 'a' is also the id of row 1, a different task"),
        ("metadata_json", "[1]", "metadata_json is JSON, but not an object"),
        ("metadata_json", "{", "metadata_json is not JSON .Expecting property name"),
        ("metadata_json", "[" * 100_000, "metadata_json is not JSON"),
    ],
)
def test_a_bad_cell_of_a_training_file_is_named(tmp_path: Path, column: str, value: Any, complaint: str) -> None:
    write_tasks(tmp_path / "t.parquet", [Task("a", (Message("user", "x"),), "task", "truth")] * 2)
    rows = pq.read_table(tmp_path / "t.parquet").to_pylist()
    rows[1][column] = value
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    wanted = f"1 of 2 rows do not have the rl form: row 2: .*({complaint}).*--dataset-type rl"
    with pytest.raises(UserError, match=wanted):
        read_tasks(tmp_path / "t.parquet")


def test_a_training_file_is_looked_at_as_a_whole(tmp_path: Path) -> None:
    task = Task("a", (Message("user", "x"),), "task", "truth", "about")
    write_tasks(tmp_path / "t.parquet", [task] * 10)
    rows = pq.read_table(tmp_path / "t.parquet").to_pylist()
    for row in (3, 4, 8, 9):
        rows[row]["ground_truth"] = None
    rows[5] |= {"task_desc": None, "metadata_json": None}  # which may be missing
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=3)
    with pytest.raises(UserError, match=r"4 of 10 rows .*: row 4: .*; row 5: .*; row 9: .* text; and 1 more; write"):
        read_tasks(tmp_path / "t.parquet")
    for row in (3, 4, 8, 9):
        rows[row]["ground_truth"] = "truth"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=3)
    read = read_tasks(tmp_path / "t.parquet")
    assert read == [replace(task, task_desc="") if row == 5 else task for row in range(10)]


@pytest.mark.parametrize(
    ("column", "value", "complaint"),
    [
        ("task_id", 7, "column task_id has values of type int64, but they must be text"),
        ("ground_truth", 0.5, "column ground_truth .* of type double"),
        ("task_desc", [1], "column task_desc .* of type list"),
        ("metadata_json", {"a": 1}, "column metadata_json .* of type struct"),
        ("prompt", "hello", r"column prompt has type string, but a chat is a list of \{role, content\}"),
        ("prompt", [{"text": "hello"}], "column prompt has type list"),
        ("prompt", [{"role": "user", "content": 5}], "column prompt has contents of type int64"),
    ],
)
def test_a_column_of_another_type_is_named(tmp_path: Path, column: str, value: Any, complaint: str) -> None:
    write_tasks(tmp_path / "t.parquet", [Task("a", (Message("user", "x"),), "task", "truth")] * 2)
    rows = [{**row, column: value} for row in pq.read_table(tmp_path / "t.parquet").to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=complaint):
        read_tasks(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [({"conv_id": None}, "conv_id is null"), ({"messages": None}, "messages is null"), ({"messages": []}, "is empty")],
)
def test_a_bad_conversation_is_named(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    write_conversations(
        tmp_path / "c.parquet", [Conversation("0", (Message("user", "x"), Message("assistant", "y")))] * 2
    )
    rows = pq.read_table(tmp_path / "c.parquet").to_pylist()
    pq.write_table(pa.Table.from_pylist([rows[0], {**rows[1], **changes}]), tmp_path / "c.parquet")
    with pytest.raises(
        UserError, match=f"1 of 2 rows do not have the sft form: row 2: .*{complaint}.*--dataset-type sft"
    ):
        read_conversations(tmp_path / "c.parquet")


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    write_tasks(tmp_path / "t.parquet", [Task("a", (Message("user", "x"),), "task", "truth")] * 2)
    table = pq.read_table(tmp_path / "t.parquet")
    bad = pa.array([b"fine", b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(table.set_column(3, "ground_truth", bad), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"column ground_truth .* not UTF-8"):
        read_tasks(tmp_path / "t.parquet")
