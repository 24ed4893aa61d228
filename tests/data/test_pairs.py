"""DPO pairs: their parquet files, and the selection of those that can be trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from collab_megatron.data.chat import ChatTemplate
from collab_megatron.data.pair_tokens import read_pair_rows
from collab_megatron.data.parquet import Pair, read_pair_files, read_pairs, write_pairs
from collab_megatron.demo.tokenizer import build_tokenizer
from collab_megatron.errors import UserError
from collab_megatron.types import Message

ASKS, GUESSES = Message("assistant", "which day?"), Message("assistant", "a table for 4")
PAIR = Pair("7", (Message("system", "be brief"), Message("user", "a table")), (ASKS,), (GUESSES,))
LONG = replace(PAIR, rejected=(Message("assistant", "which day? " * 60),))


def test_pairs_come_back_as_they_were_written(tmp_path: Path) -> None:
    several = replace(PAIR, conv_id="8", chosen=(ASKS, Message("user", "monday"), GUESSES))
    assert write_pairs(tmp_path / "a.parquet", [PAIR, several]) == 2
    assert read_pairs(tmp_path / "a.parquet") == [PAIR, several]
    assert pq.read_schema(tmp_path / "a.parquet").names == ["conv_id", "prompt", "chosen", "rejected"]
    write_pairs(tmp_path / "b.parquet", [replace(PAIR, conv_id="9"), LONG])
    assert read_pair_files([tmp_path / "a.parquet", tmp_path / "b.parquet"]) == ([PAIR, several, LONG], 1)


@pytest.mark.parametrize(
    ("column", "value", "complaint"),
    [
        ("prompt", [], "prompt is empty"),
        ("prompt", [{"role": "assistant", "content": "a"}], "prompt must end with a user turn"),
        ("chosen", None, "chosen is null"),
        ("chosen", [{"role": "user", "content": "a"}], "chosen must begin and end with an assistant turn"),
        ("rejected", [{"role": "assistant", "content": " "}], "rejected begins with an empty turn"),
        ("rejected", [{"role": "assistant", "content": "which day?"}], "chosen and rejected are equal"),
        ("rejected", [{"role": "assistant", "content": None}], "content is null, but must be text"),
    ],
)
def test_a_pair_that_cannot_be_used_is_named(tmp_path: Path, column: str, value: Any, complaint: str) -> None:
    write_pairs(tmp_path / "p.parquet", [PAIR, PAIR])
    rows = pq.read_table(tmp_path / "p.parquet").to_pylist()
    rows[1][column] = value
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    wanted = f"1 of 2 rows do not have the dpo form: row 2: .*{complaint}.*--dataset-type dpo"
    with pytest.raises(UserError, match=wanted):
        read_pairs(tmp_path / "p.parquet")


def test_long_pairs_and_pairs_of_equal_tokens_are_left_out_and_counted(tmp_path: Path) -> None:
    chat = ChatTemplate(build_tokenizer())
    unknown = replace(PAIR, chosen=(Message("assistant", "xyzzy"),), rejected=(Message("assistant", "plugh"),))
    write_pairs(tmp_path / "p.parquet", [PAIR, LONG, unknown, PAIR])
    found = read_pair_rows([tmp_path / "p.parquet"], chat, max_tokens=60)
    assert (len(found.kept), found.left_out) == (2, 2)
    too_long, same = found.notices
    assert "1 of 4 pairs" in too_long
    assert "number 2" in too_long
    assert "1 pairs" in same
    with pytest.raises(UserError, match="raise max_tokens"):
        read_pair_rows([tmp_path / "p.parquet"], chat, max_tokens=3)
    write_pairs(tmp_path / "same.parquet", [unknown])
    with pytest.raises(UserError, match="two replies that differ as tokens"):
        read_pair_rows([tmp_path / "same.parquet"], chat, max_tokens=60)
