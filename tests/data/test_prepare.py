"""The work of tools/prepare_dataset.py on real files: held-out rows, errors, skipped rows, system prompts."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from collab_megatron.data.collab_rows import FLAT_COLUMNS, NESTED_COLUMNS, parse_rows
from collab_megatron.data.parquet import read_conversations, read_tasks
from collab_megatron.data.prepare import PrepareOptions, collaborative_prompt, prepare, text_or_file
from collab_megatron.data.splits import split_rows, task_position
from collab_megatron.data_engine.problems import NEEDED
from collab_megatron.errors import UserError
from collab_megatron.types import Message
from tests.conftest import REPOSITORY
from tests.data.test_datasets import flat, turn


def write(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def rows_of(conversations: range) -> list[dict[str, Any]]:
    """Two turns of two candidates each; every opening names its conversation."""
    return [
        flat(conv, t, f"r{s}", float(s), prompt=[turn("user", f"opening {conv}"), *later])
        for conv in conversations
        for t, later in enumerate(([], [turn("assistant", "which day?"), turn("user", "monday")]))
        for s in (0, 1)
    ]


def test_an_sft_set_never_holds_what_an_rl_set_holds_out(tmp_path: Path) -> None:
    """Another call, order, conv_id, form and number of rows; the shares of both are the default."""
    rows = rows_of(range(300))
    nested = [
        {
            "single_turn_prompt": f"  task   {conv}\n",
            "turns": [{"prompt": [turn("user", f"opening {conv}")], "responses": [{"completion": "x"}]}],
        }
        for conv in random.Random(1).sample(range(300), 250)
    ]
    rl_train, rl_held_out = prepare("rl", write(tmp_path / "flat.jsonl", rows), tmp_path / "rl")
    sft_train, sft_held_out = prepare("sft", write(tmp_path / "nested.jsonl", nested), tmp_path / "sft")
    openings = [
        {task.prompt[0].content for task in read_tasks(rl_train.path)},
        {task.prompt[0].content for task in read_tasks(rl_held_out.path)},
        {chat.messages[0].content for chat in read_conversations(sft_train.path)},
        {chat.messages[0].content for chat in read_conversations(sft_held_out.path)},
    ]
    assert not openings[2] & openings[1]
    assert not openings[0] & openings[3]
    assert openings[3] <= openings[1]
    assert 15 < len(openings[1]) < 45  # 10 % of 300 tasks
    assert len(openings[0]) + len(openings[1]) == 300


def test_a_share_holds_out_whole_tasks_and_all_of_a_smaller_share() -> None:
    rows = parse_rows([flat(conv, t, "x", 1.0) for conv in range(400) for t in (0, 0, 1)], "f")
    train, held_out = split_rows(rows, 0.2)
    assert len(train) + len(held_out) == len(rows)
    assert not {row.single_turn_prompt for row in train} & {row.single_turn_prompt for row in held_out}
    assert 50 < len({row.conv_id for row in held_out}) < 110
    assert {row.conv_id for row in split_rows(rows, 0.1)[1]} < {row.conv_id for row in held_out}
    assert task_position("a  b\n") == task_position("a b") != task_position("ab")
    for share in (-0.1, 1.0):
        with pytest.raises(UserError, match="must be above 0 and below 1"):
            split_rows(rows, share)
    with pytest.raises(UserError, match="none of the 1 tasks falls into the held-out share of 1e-06"):
        split_rows(rows[:3], 1e-6)


def test_held_out_rows_that_are_trained_on_are_refused(tmp_path: Path) -> None:
    train, held_out = (
        write(tmp_path / "a.jsonl", rows_of(range(10))),
        write(tmp_path / "b.jsonl", rows_of(range(8, 12))),
    )
    with pytest.raises(
        UserError, match=r"2 of the 4 held-out tasks in .*b\.jsonl are also in .*a\.jsonl, such as 'task 8'"
    ):
        prepare("rl", train, tmp_path / "out", validation=held_out)
    assert not (tmp_path / "out").exists()
    clean = write(tmp_path / "c.jsonl", rows_of(range(10, 12)))
    written = prepare("rl", train, tmp_path / "out", validation=clean, options=PrepareOptions(max_rows=3))
    assert [part.rows_written for part in written] == [3, 3]
    with pytest.raises(UserError, match="not both"):
        prepare("rl", train, tmp_path / "out", validation=clean, validation_share=0.2)


def test_nothing_is_held_out_where_the_share_is_zero(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", rows_of(range(10)))
    (only,) = prepare("sft", source, tmp_path / "out", validation_share=0)
    assert (only.path.name, only.rows_written) == ("sft_train.parquet", 10)
    assert {chat.messages[-1].content for chat in read_conversations(only.path)} == {"r1"}


def test_bad_rows_stop_or_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*rows_of(range(2)), {**flat(3, 0, "x", 1.0), "prompt": "text"}]
    source = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match="row 9: prompt must be a list"):
        prepare("rl", source, tmp_path, validation_share=0)
    prepare("rl", source, tmp_path, validation_share=0, skip_bad_rows=True)
    skipped, *_ = capsys.readouterr().out.splitlines()
    assert skipped == f"skipped 1 of 9 rows: {source}: row 9: prompt must be a list of mappings"


def test_plain_messages_train_sft_alone(tmp_path: Path) -> None:
    chats = [{"messages": [turn("user", f"hi {i}"), turn("assistant", "yes")]} for i in range(40)]
    source = write(tmp_path / "chats.jsonl", chats)
    train, held_out = prepare("sft", source, tmp_path / "out", options=PrepareOptions(system_prompt="S"))
    assert train.rows_written + held_out.rows_written == 40
    assert read_conversations(train.path)[0].messages[0] == Message("system", "S")
    with pytest.raises(UserError, match=r"40 of 40 rows of .* are plain messages .*use --dataset-type sft"):
        prepare("rl", source, tmp_path / "out")


def test_the_shipped_prompt_and_a_task_description_stand_where_they_should(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", rows_of(range(3)))
    options = PrepareOptions(system_prompt=collaborative_prompt(), task_desc="booking")
    (written,) = prepare("rl", source, tmp_path, validation_share=0, options=options)
    for task in read_tasks(written.path):
        assert task.task_desc == "booking"
        assert task.prompt[0].role == "system"
        assert "ask" in task.prompt[0].content
        assert not task.prompt[0].content.endswith("\n")


def test_a_text_or_the_file_that_holds_it(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("  Be brief.\n")
    assert text_or_file(str(tmp_path / "prompt.txt"), "--system-prompt") == "Be brief."
    assert text_or_file("Be brief.", "--system-prompt") == "Be brief."
    assert text_or_file("x" * 5000, "--system-prompt") == "x" * 5000
    with pytest.raises(UserError, match=r"--system-prompt .*promt\.txt: there is no such file"):
        text_or_file(str(tmp_path / "promt.txt"), "--system-prompt")


def test_the_rows_in_the_docs_can_be_read() -> None:
    text = (REPOSITORY / "docs" / "data.md").read_text()
    rows = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, flags=re.DOTALL)]
    found = parse_rows(rows, "docs")
    assert [row.completion for row in found] == [
        *("For which day?", "For which day?", "BOOK today", "Hello, what can I do for you?")
    ]
    for column in (*FLAT_COLUMNS, *NESTED_COLUMNS, *NEEDED, "messages"):
        assert f"| **{column}** |" in text


def test_a_nested_row_without_a_response_is_refused_and_not_lost() -> None:
    for turns in ([], [{"prompt": [{"role": "user", "content": "hello"}], "responses": []}]):
        with pytest.raises(UserError, match="row 1: turns have no response"):
            parse_rows([{"single_turn_prompt": "a task", "turns": turns}], "rows.jsonl")


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        ("rl", ["--metric", "accuracy"], "--metric"),
        ("sft", ["--turns", "first"], "--turns first"),
        ("sft", ["--threshold", "0.5"], "--threshold"),
        ("sft", ["--minimum-gap", "0.5"], "--minimum-gap"),
        ("dpo", ["--metric", "accuracy"], "--metric"),
        ("dpo", ["--minimum-gap", "-1"], "--minimum-gap"),
        ("dpo", ["--max-tokens", "10"], "--max-tokens"),
    ],
)
def test_an_option_without_effect_is_refused(tmp_path: Path, kind: str, options: list[str], named: str) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("")
    tool = [
        sys.executable,
        str(REPOSITORY / "tools" / "prepare_dataset.py"),
        "--dataset",
        str(rows),
        "--output",
        str(tmp_path / "out"),
    ]
    ended = subprocess.run([*tool, "--dataset-type", kind, *options], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {named} ")
