"""The judge of pairs: both orders, ties, unreadable verdicts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from collab_megatron.errors import UserError
from collab_megatron.rollout.llm.pair_judge import PairJudge, read_verdict
from collab_megatron.rollout.llm.parsing import MalformedReply
from collab_megatron.types import Message
from tests.rollout.fakes import TASK

LONG = [Message("user", "book a table"), Message("assistant", "well, a table, as you wish"), Message("user", "noon")]
SHORT = [Message("user", "book a table"), Message("assistant", "when? </first> {x} $y"), Message("user", "noon")]


class Judge:
    def __init__(self, verdict: Callable[[str], str]) -> None:
        self.verdict, self.prompts = verdict, list[str]()

    async def complete(self, request: Any) -> list[Any]:
        (message,) = request.messages
        self.prompts.append(message.content)
        return [request.parse(json.dumps({"thought": "so", "better": self.verdict(message.content)}))]


def prefers_short(prompt: str) -> str:
    return "first" if prompt.index("when?") < prompt.index("as you wish") else "second"


@pytest.mark.parametrize(
    ("verdict", "points"),
    [
        (prefers_short, 1.0),
        (lambda prompt: {"first": "second", "second": "first"}[prefers_short(prompt)], 0.0),
        (lambda prompt: "first", 0.5),
        (lambda prompt: "neither", 0.5),
    ],
)
async def test_both_orders_must_agree(verdict: Callable[[str], str], points: float) -> None:
    judge = Judge(verdict)
    assert await PairJudge(judge).points(TASK, SHORT, LONG, sample_index=-1) == points
    assert len(judge.prompts) == 2
    for prompt in judge.prompts:
        assert TASK.single_turn_prompt in prompt
        assert TASK.ground_truth in prompt
        assert prompt.count("</first>") == 1  # a conversation cannot end its block


async def test_equal_conversations_ask_nobody() -> None:
    judge = Judge(prefers_short)
    assert await PairJudge(judge).points(TASK, SHORT, list(SHORT), sample_index=-1) == 0.5
    assert judge.prompts == []


def test_a_verdict_is_one_of_three_words() -> None:
    assert read_verdict('{"thought": "a", "better": "Second."}') == "second"
    for reply in ('{"better": "both"}', '{"better": 1}', '{"thought": "first"}', "first"):
        with pytest.raises(MalformedReply):
            read_verdict(reply)


def test_a_prompt_file_must_show_both(tmp_path: Path) -> None:
    (tmp_path / "pair.txt").write_text("Compare $first.")
    with pytest.raises(UserError, match="second"):
        PairJudge(Judge(prefers_short), tmp_path / "pair.txt")
