"""Rows of all forms and sources, to RL tasks and SFT conversations; errors name the row and the problem."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from collab_megatron.data.bad_rows import BadRows
from collab_megatron.data.collab_rows import parse_rows
from collab_megatron.data.dataset_source import load_rows
from collab_megatron.data.parquet import (
    Conversation,
    read_conversation_files,
    read_conversations,
    read_task_files,
    read_tasks,
    write_conversations,
    write_tasks,
)
from collab_megatron.data.rl_tasks import rl_tasks
from collab_megatron.data.row_order import refill_index, step_indices
from collab_megatron.data.sft_conversations import sft_conversations
from collab_megatron.errors import UserError
from collab_megatron.types import Message, Task


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


OPENING = [turn("user", "a table")]
LONGER = [*OPENING, turn("assistant", "which day?"), turn("user", "monday")]


def flat(conv_id: int, turn_id: int, completion: str, score: float | None, **changes: Any) -> dict[str, Any]:
    row = {
        "prompt": LONGER if turn_id else OPENING,
        "completion": completion,
        "conv_id": conv_id,
        "score": score,
        "single_turn_prompt": f"task {conv_id}",
        "single_turn_completion": f"answer {conv_id}",
        "single_turn_metadata": {"ambiguous": True, "missing": ["day"]},
        "turn_id": turn_id,
        "sessions": [[turn("user", "bye")]],
        "rewards": {"accuracy": 1.0, "interactivity": 0.5},
    }
    return {**row, **changes}


FLAT = [
    flat(0, 0, "which day?", 1.5),
    flat(0, 0, "BOOK", 0.5),
    flat(0, 1, "BOOK monday", 1.0),
    flat(0, 1, "BOOK tuesday", 0.1, rewards={"accuracy": 0.0}),
    flat(1, 0, "BOOK now", None, rewards={}),
]
NESTED = [
    {
        "single_turn_prompt": "task 0",
        "single_turn_completion": "answer 0",
        "single_turn_metadata": json.dumps({"ambiguous": True, "missing": ["day"]}),
        "turns": [
            {
                "prompt": prompt,
                "responses": [
                    {name: row[name] for name in ("completion", "score", "sessions", "rewards")}
                    for row in FLAT[first : first + 2]
                ],
            }
            for prompt, first in ((OPENING, 0), (LONGER, 2))
        ],
    }
]


def test_flat_and_nested_rows_are_the_same() -> None:
    assert parse_rows(NESTED, "n") == parse_rows(FLAT[:4], "f")


def test_every_place_gives_the_same_rows(tmp_path: Path) -> None:
    rows = FLAT[:4]
    expected = parse_rows(rows, "memory")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "part-0.jsonl").write_text("\n".join(map(json.dumps, rows[:1])))
    (folder / "part-1.jsonl").write_text("\n".join(map(json.dumps, rows[1:])))
    (folder / "notes.json").write_text("{}")
    hub_like = tmp_path / "hub"
    (hub_like / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), hub_like / "data" / "train-00000-of-00001.parquet")
    pq.write_table(pa.Table.from_pylist(FLAT[3:4]), hub_like / "data" / "test-00000-of-00001.parquet")
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "dict"))
    for name in ("a.jsonl", "a.json", "a.parquet", "folder", "hub", "saved", "dict"):
        assert load_rows(str(tmp_path / name)) == expected, name
    with pytest.raises(UserError, match="no split 'test', but train"):
        load_rows(str(tmp_path / "dict"), ["test"])
    both = load_rows(str(hub_like), ["train", "test"])
    assert both == [*expected, *expected[3:4]]
    with pytest.raises(UserError, match=r"no file of split 'dev', but test-.*, train-"):
        load_rows(str(hub_like), ["dev"])
    for name in ("a.jsonl", "folder", "saved"):
        with pytest.raises(UserError, match="leave --split out"):
            load_rows(str(tmp_path / name), ["train"])


def test_parquet_fills_what_a_row_lacks_with_null(tmp_path: Path) -> None:
    mixed = [flat(0, 0, "a", 1.0), flat(1, 0, "b", None, rewards={"bleu": 0.3}, single_turn_metadata={"x": 1})]
    pq.write_table(pa.Table.from_pylist(mixed), tmp_path / "m.parquet")
    second = load_rows(str(tmp_path / "m.parquet"))[1]
    assert "ambiguous" not in second.metadata
    assert second.score is None


@pytest.mark.parametrize("column", ["prompt", "completion", "conv_id", "single_turn_prompt"])
def test_a_missing_column_is_named(tmp_path: Path, column: str) -> None:
    row = flat(0, 0, "a", 1.0)
    del row[column]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(UserError, match=f"rows.jsonl has no column '{column}'; its columns are .*score"):
        load_rows(str(path))


def test_all_missing_columns_are_named_at_once() -> None:
    rows = [flat(0, 0, "a", 1.0) for _ in range(8)]
    for row in rows:
        del row["conv_id"]
    for row in rows[1:]:
        del row["completion"]
    with pytest.raises(
        UserError,
        match=r"no columns 'conv_id', 'completion' in 7 of 8 rows \(2, 3, 4, 5, 6, \.\.\.\); its columns are prompt, ",
    ):
        parse_rows(rows, "rows")


def test_a_turn_without_number_is_counted_from_its_prompt() -> None:
    """Rows of the original CollabLLM have no turn_id."""
    rows = [flat(0, 5, "late", 1.0), flat(0, 0, "early", 2.0)]
    del rows[0]["turn_id"]
    rows[1]["turn_id"] = float("nan")  # as tables of numbers write what is missing
    found = parse_rows(rows, "rows")
    assert [row.turn_id for row in found] == [1, 0]
    assert sft_conversations(found)[0].messages[-1].content == "late"


def test_plain_messages_are_conversations() -> None:
    chats = [[turn("system", "s"), *LONGER, turn("assistant", "BOOK")], [*OPENING, turn("assistant", "no")]]
    found = parse_rows([{"messages": chat} for chat in chats], "rows")
    assert [chat.messages for chat in sft_conversations(found)] == [
        tuple(Message(t["role"], t["content"]) for t in chat) for chat in chats
    ]
    assert [row.single_turn_prompt for row in found] == ["a table", "a table"]
    for bad, complaint in [(LONGER, "must end with a user turn and the assistant"), ([], "at least one entry")]:
        with pytest.raises(UserError, match=f"rows: row 1: messages.*{complaint}"):
            parse_rows([{"messages": bad}], "rows")


def test_rows_that_cannot_be_read_may_be_skipped(tmp_path: Path) -> None:
    good, bad_row = flat(0, 0, "a", 1.0), {**flat(0, 0, "a", 1.0), "score": "high"}
    lacking = {k: v for k, v in good.items() if k != "prompt"}
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([json.dumps(good), "{", json.dumps(bad_row), json.dumps(lacking), json.dumps(good), "7"]))
    bad = BadRows(skip=True)
    assert len(load_rows(str(path), (), bad)) == 2
    notice = bad.notice()
    assert notice.startswith("skipped 4 of 6 rows: ")
    for part in ("line 2 is not valid JSON", "row 2: score must be a number", "row 3 has no prompt", "and 1 more"):
        assert part in notice
    path.write_text("{")
    with pytest.raises(UserError, match=r"holds no rows that can be read; the first: .*line 1 is not valid JSON"):
        load_rows(str(path), (), BadRows(skip=True))


def test_conversations_with_one_number_stay_apart() -> None:
    """Splits and files that are put together all count from 0."""
    rows = [flat(0, 0, "one", 1.0, single_turn_prompt="x"), flat(0, 1, "two", 1.0, single_turn_prompt="y")]
    found = parse_rows(rows, "rows")
    assert len(sft_conversations(found)) == 2
    assert len(rl_tasks(found, first_turn_only=True)) == 2


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"prompt": "hello"}, "prompt must be a list"),
        ({"prompt": []}, "at least one entry"),
        ({"prompt": [turn("assistant", "hi")]}, "must end with a user turn"),
        ({"prompt": [turn("tool", "hi")]}, "roles must be among"),
        ({"prompt": [turn("user", "a"), {"text": "b"}]}, "list of {role, content}"),
        ({"completion": None}, "completion must be text"),
        ({"score": "high"}, "score must be a number"),
        ({"turn_id": "first"}, "turn_id must be a whole number"),
        ({"single_turn_metadata": "{'a': __import__('os')}"}, "must be a mapping or JSON"),
        ({"completion": "\ud83d"}, "completion has half of a surrogate pair at position 0"),
        ({"prompt": [turn("user", "a\udc00")]}, "prompt has half of a surrogate pair at position 1"),
        ({"turn_id": 1.5}, "turn_id must be a whole number"),
        ({"score": float("inf")}, "score must be a finite number"),
        ({"conv_id": None}, "conv_id is empty"),
        ({"prompt": [turn("user", " ")]}, "prompt ends with an empty user turn"),
        ({"single_turn_prompt": ""}, "single_turn_prompt is empty"),
        ({"rewards": {"accuracy": "good"}}, "rewards.accuracy must be a number"),
    ],
)
def test_a_bad_cell_is_named(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=f"rows: row 2: .*{complaint}|rows: row 2: {complaint}"):
        parse_rows([flat(0, 0, "a", 1.0), {**flat(0, 0, "a", 1.0), **changes}], "rows")


def test_bad_places(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "torn.jsonl").write_text('{"a": 1}\n{"a": ')
    (tmp_path / "object.json").write_text("{}")
    (tmp_path / "bad.parquet").write_text("no parquet")
    (tmp_path / "rows.csv").write_text("a,b")
    (tmp_path / "void").mkdir()
    for name, complaint in [
        ("empty.jsonl", "holds no rows"),
        ("torn.jsonl", "line 2 is not valid JSON"),
        ("object.json", "must hold a list"),
        ("bad.parquet", "cannot be read"),
        ("rows.csv", "name must end in"),
        ("void", "holds no .parquet"),
        ("absent.jsonl", "there is no dataset"),
    ]:
        with pytest.raises(UserError, match=complaint):
            load_rows(str(tmp_path / name))


def test_rl_tasks_are_the_distinct_histories() -> None:
    tasks = rl_tasks(parse_rows(FLAT, "f"), system_prompt="Be brief.")
    assert [(task.prompt[-1].content, task.ground_truth) for task in tasks] == [
        ("a table", "answer 0"),
        ("monday", "answer 0"),
        ("a table", "answer 1"),  # the same opening of another task
    ]
    assert all(task.prompt[0] == Message("system", "Be brief.") for task in tasks)
    assert len({task.task_id for task in tasks}) == 3
    assert tasks[0].ambiguous is True
    assert len(rl_tasks(parse_rows(FLAT, "f"), first_turn_only=True)) == 2


def test_ground_truth_falls_back() -> None:
    def truth(**changes: Any) -> str:
        return rl_tasks(parse_rows([flat(0, 0, "reply", 1.0, **changes)], "f"))[0].ground_truth

    assert truth(ground_truth="given") == "given"
    assert truth() == "answer 0"
    assert truth(single_turn_completion="") == "reply"


def test_sft_takes_the_last_turn_then_the_best_score() -> None:
    chats = sft_conversations(parse_rows(FLAT, "f"))
    assert [(chat.conv_id, chat.messages[-1].content, len(chat.messages)) for chat in chats] == [
        ("0", "BOOK monday", 4),
        ("1", "BOOK now", 2),
    ]
    strict = sft_conversations(parse_rows(FLAT, "f"), metric="interactivity", threshold=0.5)
    assert [chat.conv_id for chat in strict] == ["0"]
    with pytest.raises(UserError, match="no row has a reward named 'bleu'"):
        sft_conversations(parse_rows(FLAT, "f"), metric="bleu")
    with pytest.raises(UserError, match="lower the threshold"):
        sft_conversations(parse_rows(FLAT, "f"), metric="accuracy", threshold=2.0)


def test_parquet_brings_back_what_was_written(tmp_path: Path) -> None:
    tasks = [
        Task(
            "a", (Message("user", "é {x}"),), "task", "truth", "desc", {"missing": ["day"], "n": 1, "ambiguous": None}
        ),
        Task("b", (Message("system", "s"), Message("user", "y")), "task", "truth"),
    ]
    assert write_tasks(tmp_path / "deep" / "t.parquet", tasks) == 2
    assert read_tasks(tmp_path / "deep" / "t.parquet") == tasks
    chats = sft_conversations(parse_rows(FLAT, "f"))
    write_conversations(tmp_path / "c.parquet", chats)
    assert read_conversations(tmp_path / "c.parquet") == chats
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.parquet", "deep"]
    with pytest.raises(UserError, match=r"no column 'task_id'.*--dataset-type rl"):
        read_tasks(tmp_path / "c.parquet")
    with pytest.raises(UserError, match="no file"):
        read_tasks(tmp_path / "none.parquet")
    write_tasks(tmp_path / "e.parquet", [])
    with pytest.raises(UserError, match="holds no rows"):
        read_tasks(tmp_path / "e.parquet")
    (tmp_path / "x.parquet").write_text("x")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        read_tasks(tmp_path / "x.parquet")


def test_all_rows_that_cannot_be_read_are_told_of() -> None:
    rows = [flat(0, 0, "a", 1.0) for _ in range(6)]
    for row in (1, 2, 4, 5):
        rows[row]["score"] = "high"
    with pytest.raises(UserError, match=r"rows: row 2: score .*; rows: row 3: .*; rows: row 5: .*; and 1 more"):
        parse_rows(rows, "rows")


def test_rows_of_several_files_follow_each_other(tmp_path: Path) -> None:
    def task(name: str, wish: str) -> Task:
        return Task(name, (Message("user", wish),), wish, "truth")

    a, b, c = tmp_path / "a.parquet", tmp_path / "b.parquet", tmp_path / "c.parquet"
    write_tasks(a, [task("1", "tea"), task("1", "tea"), task("2", "milk")])  # a row that stands twice has weight two
    write_tasks(b, [task("2", "milk"), task("3", "rum")])
    assert read_task_files([a]) == (read_tasks(a), 0)
    tasks, repeated = read_task_files([a, b])
    assert ([t.task_id for t in tasks], repeated) == (["1", "1", "2", "3"], 1)
    write_tasks(c, [task("3", "gin")])
    with pytest.raises(UserError, match=r"task_id '3' names different tasks in .*b\.parquet and .*c\.parquet"):
        read_task_files([a, b, c])
    with pytest.raises(UserError, match=r"no file .*d\.parquet"):
        read_task_files([a, tmp_path / "d.parquet"])
    chat = (Message("user", "hi"), Message("assistant", "hello"))
    write_conversations(a, [Conversation("0", chat), Conversation("1", chat[:1])])
    write_conversations(b, [Conversation("0", chat[1:]), Conversation("7", chat)])  # ids count from 0 everywhere
    chats, repeated = read_conversation_files([a, b])
    assert ([len(c.messages) for c in chats], repeated) == ([2, 1, 1], 1)


def test_refills_meet_a_row_once_an_epoch_and_never_next_to_itself() -> None:
    """A refill's row is a function of seed, step and number: which others were refilled makes no difference."""
    rows, batch = 40, 4  # ten steps an epoch
    refills = [[refill_index(7, step, r, num_rows=rows, batch_size=batch) for r in range(batch)] for step in range(10)]
    assert sorted(row for step in refills for row in step) == list(range(rows))
    for step, mine in enumerate(refills):
        near = [row for at in range(step, step + 3) for row in step_indices(7, at, num_rows=rows, batch_size=batch)]
        if step < 7:
            assert not set(mine) & set(near)
    assert refills[0] == step_indices(7, 5, num_rows=rows, batch_size=batch)  # the epoch's order, half of it ahead
    assert refill_index(7, 0, 0, num_rows=1, batch_size=4) == 0


def test_order_takes_every_row_once_an_epoch_and_can_start_anywhere() -> None:
    steps = [step_indices(7, step, num_rows=10, batch_size=4) for step in range(5)]
    flat_order = [index for step in steps for index in step]
    assert sorted(flat_order[:10]) == sorted(flat_order[10:20]) == list(range(10))
    assert flat_order[:10] != flat_order[10:20]
    assert step_indices(7, 3, num_rows=10, batch_size=4) == steps[3] != step_indices(8, 3, num_rows=10, batch_size=4)
    assert len(step_indices(1, 0, num_rows=3, batch_size=8)) == 8
    with pytest.raises(ValueError, match="does not exist"):
        step_indices(1, 0, num_rows=0, batch_size=4)
