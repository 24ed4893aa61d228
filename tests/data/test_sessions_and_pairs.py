"""Sessions in every stored form, DPO pairs, statistics and the length check of tools/prepare_dataset.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from collab_megatron.data.chat import ChatTemplate, load_tokenizer
from collab_megatron.data.collab_rows import parse_rows
from collab_megatron.data.lengths import LengthCheck
from collab_megatron.data.parquet import read_conversations, read_pairs, read_tasks
from collab_megatron.data.preference_pairs import preference_pairs
from collab_megatron.data.prepare import Kind, PrepareOptions, prepare
from collab_megatron.data.sessions import read_futures, whole_sessions
from collab_megatron.data.statistics import describe_rows
from collab_megatron.errors import UserError
from collab_megatron.types import Message
from tests.data.test_datasets import OPENING, flat, turn

PROMPT = (Message("system", "Be brief."), Message("user", "a table"))
REPLY = "which day?"
FUTURES = (
    (Message("user", "monday"), Message("assistant", "BOOK monday"), Message("user", "[TERMINATE]")),
    (Message("user", "never mind [TERMINATE]"),),
)


def numbered(chats: list[Any]) -> dict[str, Any]:
    """As the hub's -large datasets; in parquet, later sessions of longer rows are null."""
    found: dict[str, Any] = {
        str(number): {
            "average_score": 0.5 + number,
            "forward_chat": chat,
            "interactivity": {"score": 0.25, "thought": "fine"},
            "accuracy": None,
        }
        for number, chat in enumerate(chats)
    }
    return {**found, str(len(chats)): None}


def test_every_form_of_sessions_is_the_same_futures() -> None:
    future_form = [[message.as_dict() for message in future] for future in FUTURES]
    whole_form = whole_sessions(PROMPT, REPLY, FUTURES)
    assert whole_form[1] == [*OPENING, turn("assistant", REPLY), turn("user", "never mind [TERMINATE]")]
    with_reply = [[turn("assistant", REPLY), *chat] for chat in future_form]
    with_system = [[turn("system", "Be brief."), *chat] for chat in whole_form]
    for form in (future_form, whole_form, with_reply, with_system):
        assert read_futures(form, PROMPT, REPLY) == FUTURES
        assert read_futures(numbered(form), PROMPT, REPLY) == FUTURES
    assert read_futures(None, PROMPT, REPLY) == read_futures([], PROMPT, REPLY) == ()


def test_sessions_are_read_in_the_order_of_their_numbers() -> None:
    many = {str(n): {"forward_chat": [turn("user", f"u{n}")]} for n in (10, 2, 0)}
    assert [future[0].content for future in read_futures(many, PROMPT, REPLY)] == ["u0", "u2", "u10"]


@pytest.mark.parametrize("value", ["text", 7, [7], [[7]], [[{"role": "user"}]], {"0": {"forward_chat": None}}])
def test_sessions_of_an_unknown_form_refuse_no_row_and_are_counted(value: Any) -> None:
    with pytest.raises(ValueError, match="session"):
        read_futures(value, PROMPT, REPLY)
    rows = parse_rows([flat(0, 0, "a", 1.0, sessions=value), flat(0, 0, "b", 1.0)], "rows")
    assert [row.futures for row in rows] == [None, ((Message("user", "bye"),),)]
    assert any("of 1 rows have an unknown form" in line for line in describe_rows(rows))


def test_rewards_of_numbered_sessions_count_where_a_row_has_none_of_its_own() -> None:
    sessions = numbered([[turn("user", "bye")], [turn("user", "bye")]])
    (row,) = parse_rows([flat(0, 0, "a", 1.0, sessions=sessions, rewards=None)], "rows")
    assert row.rewards == {"MR": 1.0, "interactivity": 0.25}
    (row,) = parse_rows([flat(0, 0, "a", 1.0, sessions=sessions, rewards={"MR": [1.0, 3.0], "acc": [1, 0]})], "rows")
    assert row.rewards == {"MR": 2.0, "acc": 0.5}


def candidates(conv: int, *scores: float | None, turn_id: int = 0) -> list[dict[str, Any]]:
    return [flat(conv, turn_id, f"reply {number}", score) for number, score in enumerate(scores)]


def test_a_pair_is_the_best_against_the_worst_of_a_turn() -> None:
    rows = [
        *candidates(0, 0.5, 1.5, 1.0),
        *candidates(0, 2.0, 1.75, turn_id=1),
        *candidates(1, 1.0, 1.0),  # no gap
        *candidates(2, 1.0),
        *candidates(3, 1.0, None),
        flat(4, 0, "same", 1.0),
        flat(4, 0, "same", 0.0),
        flat(5, 0, "fine", 1.0),
        flat(5, 0, "  ", 0.0),
    ]
    pairs = preference_pairs(parse_rows(rows, "rows"), system_prompt="S")
    assert [(pair.conv_id, pair.chosen[0].content, pair.rejected[0].content) for pair in pairs.found] == [
        ("0", "reply 1", "reply 0"),
        ("0", "reply 0", "reply 1"),
    ]
    assert pairs.found[0].prompt == (Message("system", "S"), Message("user", "a table"))
    assert (pairs.alone, pairs.close) == (4, 1)
    assert pairs.notice == (
        "left out: 5 of 7 turns: 4 have fewer than two scored, different candidates, 1 have too small a gap of scores"
    )
    wide = preference_pairs(parse_rows(rows, "rows"), minimum_gap=0.25)
    assert [pair.chosen[0].content for pair in wide.found] == ["reply 1"]  # a gap of 0.25 is not above 0.25
    with pytest.raises(UserError, match=r"no turn makes a pair \(left out: 7 of 7 turns.*lower --minimum-gap"):
        preference_pairs(parse_rows(rows, "rows"), minimum_gap=5.0)


def test_two_conversations_with_one_number_make_no_common_pair() -> None:
    rows = [
        *(flat(0, 0, "a", 1.0, prompt=[turn("user", "one")]), flat(0, 0, "b", 0.0, prompt=[turn("user", "two")])),
        *candidates(7, 1.0, 0.0),
    ]
    assert [pair.conv_id for pair in preference_pairs(parse_rows(rows, "rows")).found] == ["7"]


def test_dpo_files_hold_out_the_tasks_that_rl_files_hold_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "rows.jsonl"
    rows = [row for conv in range(200) for row in candidates(conv, 0.0, 1.0)]
    source.write_text("\n".join(map(json.dumps, rows)))
    train, held_out = prepare("dpo", str(source), tmp_path / "out")
    assert train.path.name == "dpo_train.parquet"
    assert train.rows_written + held_out.rows_written == 200
    prepare("rl", str(source), tmp_path / "out")
    wanted = {task.single_turn_prompt for task in read_tasks(tmp_path / "out" / "rl_validation.parquet")}
    assert {f"task {pair.conv_id}" for pair in read_pairs(held_out.path)} == wanted
    said = capsys.readouterr().out
    for part in (
        "400 rows, 200 conversations about 200 tasks",
        "turns       1 a conversation; candidates 2 a turn",
        "score       0.5 (mean), 0.5 (std); best minus worst of a turn: 1 (mean of 200)",
        "rewards     accuracy 1, interactivity 0.5 (means)",
        "sessions    400, of 1 user turns",
    ):
        assert part in said


def test_rows_are_measured_with_the_template_of_the_model(tmp_path: Path, tiny_model: Path) -> None:
    chat = ChatTemplate(load_tokenizer(tiny_model))
    source = tmp_path / "rows.jsonl"
    rows = [row for conv in range(9) for row in candidates(conv, 0.0, 1.0)]
    longest = flat(9, 0, "a " * 30, 1.0), flat(9, 0, "b", 0.0)
    source.write_text("\n".join(map(json.dumps, [*rows, *longest])))
    reply = chat.sft_ids_and_mask([Message("user", "a table"), Message("assistant", "reply 1")])[0]
    long = chat.sft_ids_and_mask([Message("user", "a table"), Message("assistant", "a " * 30)])[0]
    options = PrepareOptions(lengths=LengthCheck(chat, max_tokens=len(long) - 1))
    kinds: dict[Kind, int] = {"sft": 9, "dpo": 9, "rl": 10}
    for kind, count in kinds.items():
        (written,) = prepare(kind, str(source), tmp_path / kind, validation_share=0, options=options)
        assert written.rows_written == count
        if kind != "rl":
            assert f"{len(reply)} tokens (median)" in written.notes[0]
            assert f"{len(long)} (longest)" in written.notes[0]
            assert "left out: 1 of 10 rows" in written.notes[-1]
    assert len(read_conversations(tmp_path / "sft" / "sft_train.parquet")) == 9
    with pytest.raises(UserError, match="raise --max-tokens"):
        prepare(
            "sft",
            str(source),
            tmp_path / "short",
            validation_share=0,
            options=PrepareOptions(lengths=LengthCheck(chat, max_tokens=2)),
        )
