"""What is packed comes back as it was, and requests get keys by content."""

from __future__ import annotations

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collab_megatron.rollout.journal.packing import pack_generations, pack_texts, unpack_generations, unpack_texts
from collab_megatron.rollout.journal.replies import reply_key
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


MESSAGES = [{"role": "user", "content": "hi"}]
PARAMETERS = {"temperature": 1.0, "seed": 3, "n": 1}


def test_a_key_depends_on_all_of_the_request_and_on_no_order_of_names() -> None:
    same = reply_key("m", MESSAGES, PARAMETERS, 0)
    assert len(same) == 16
    assert reply_key("m", [{"content": "hi", "role": "user"}], dict(reversed(PARAMETERS.items())), 0) == same
    others = [
        reply_key("n", MESSAGES, PARAMETERS, 0),
        reply_key("m", [{"role": "user", "content": "hi "}], PARAMETERS, 0),
        reply_key("m", [*MESSAGES, *MESSAGES], PARAMETERS, 0),
        reply_key("m", MESSAGES, {**PARAMETERS, "seed": 4}, 0),
        reply_key("m", MESSAGES, {**PARAMETERS, "response_format": {"type": "json_object"}}, 0),
        reply_key("m", MESSAGES, PARAMETERS, 1),
        reply_key("m", [{"role": "user", "content": "\ud800"}], PARAMETERS, 0),
    ]
    assert len({same, *others}) == 8


def test_a_key_is_the_same_on_every_day() -> None:
    """A change of this would make every journal useless."""
    assert reply_key("m", MESSAGES, PARAMETERS, 0).hex() == "a5429ce238415d9059db47d83c070e84"


def test_what_json_lacks_has_no_key() -> None:
    with pytest.raises(ValueError):
        reply_key("m", MESSAGES, {"temperature": math.nan}, 0)
