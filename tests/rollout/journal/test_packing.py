"""Packed turns and texts come back as they were."""

from __future__ import annotations

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collab_megatron.rollout.journal.packing import pack_generations, pack_texts, unpack_generations, unpack_texts
from collab_megatron.types import Generation

TOKENS = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.floats(allow_nan=False), st.integers(-1, 10**9)), max_size=20)


def bits(values: tuple[float, ...]) -> bytes:
    return struct.pack(f"{len(values)}d", *values)


@given(st.lists(TOKENS, max_size=3))
def test_generations_come_back_bit_for_bit(turns: list[list[tuple[int, float, int]]]) -> None:
    packed = []
    for rows in turns:
        logprobs = tuple(row[1] for row in rows)
        packed.append(Generation(tuple(row[0] for row in rows), logprobs, tuple(row[2] for row in rows), "length", 7))
    back = unpack_generations(pack_generations(packed))
    assert back == tuple(packed)
    assert [bits(turn.logprobs_T) for turn in back] == [bits(turn.logprobs_T) for turn in packed]


def test_a_log_prob_that_is_no_number_comes_back_too() -> None:
    (back,) = unpack_generations(pack_generations([Generation((1, 2), (math.nan, -math.inf), (1, 1), "stop")]))
    assert math.isnan(back.logprobs_T[0])
    assert back.logprobs_T[1] == -math.inf


def test_a_token_takes_about_twelve_bytes() -> None:
    turn = Generation(tuple(range(1000)), (-0.123456789,) * 1000, (3,) * 500 + (4,) * 500, "stop")
    assert len(pack_generations([turn])) < 12_100


@given(st.lists(st.text(st.characters(exclude_categories=()))))  # halves of surrogate pairs too
def test_texts_come_back(texts: list[str]) -> None:
    assert unpack_texts(pack_texts(texts)) == tuple(texts)


@pytest.mark.parametrize("content", [b"", b"\xc1", b"\x91\x95\xc4\x03abc\xc4\x00\x90\xa4stop\x00"])
def test_other_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(ValueError):
        unpack_generations(content)
