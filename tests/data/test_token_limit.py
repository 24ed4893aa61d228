"""Rows that do not fit are left out and reported; if that is most of the data, it is an error."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from collab_megatron.data.token_limit import first_prompts, keep_fitting
from collab_megatron.errors import UserError
from collab_megatron.types import Message, Task


def test_rows_that_do_not_fit_are_counted_and_the_longest_is_named() -> None:
    def fit(tokens: list[int]):
        return keep_fitting(range(len(tokens)), tokens, 10, what="rows", name=str, remedy="raise it")

    whole = fit([10, 1])
    assert (whole.kept, whole.left_out, whole.notice, whole.share_left_out) == ([0, 1], 0, "", 0)
    half = fit([11, 10, 3, 12_000])
    assert (half.kept, half.left_out, half.share_left_out) == ([1, 2], 2, 0.5)
    assert half.notice == "left out: 2 of 4 rows (50.0%) have more than 10 tokens; the longest, 3, has 12,000"
    with pytest.raises(UserError, match=r"2 of 3 rows \(66.7%\) have more than 10 tokens; .*: raise it"):
        fit([11, 10, 11])


def test_the_first_prompts_are_different_and_fit() -> None:
    class Chat:
        def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
            return [len(word) for word in messages[0].content.split()]

    texts = ("a bb", "a b c d", "c dd", "ccc", "e")
    tasks = [Task(str(number), (Message("user", text),), "", "") for number, text in enumerate(texts)]
    assert first_prompts(tasks, Chat(), 2, room=3) == [(1, 2), (3,)]
    assert first_prompts(tasks, Chat(), 9, room=1) == [(3,), (1,)]
