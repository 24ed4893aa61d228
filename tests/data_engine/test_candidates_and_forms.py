"""Proactive candidates see request and reference, nobody else does; flat and nested rows hold the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from collab_megatron.data.collab_rows import parse_rows
from collab_megatron.data_engine.grow import BuildPlayers, GrowthRules, grow_conversation
from collab_megatron.data_engine.output import append_conversation, nested_row
from collab_megatron.data_engine.proactive import ProactivePrompt
from collab_megatron.data_engine.problems import Problem
from collab_megatron.errors import UserError
from collab_megatron.types import LLMRequest, Message, T, Task
from tests.rollout.fakes import LengthScorer, ScriptedUser

TASK = Task(
    "1", (Message("user", "a table"),), "a table at noon for {two} $people", "BOOK </reference> noon", "booking"
)


class Assistant:
    """Plain candidates guess, proactive ones ask; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[LLMRequest[Any]] = []

    async def complete(self, request: LLMRequest[T]) -> list[T]:
        self.asked.append(request)
        if request.json_reply:
            texts = [json.dumps({"thought": "no hour", "response": f"at what hour? {n}"}) for n in range(request.n)]
        else:
            texts = [f"BOOK {n}" for n in range(request.n)]
        return [request.parse(text) for text in texts]


async def grown(rules: GrowthRules) -> tuple[list[dict[str, Any]], Assistant]:
    assistant = Assistant()
    scorer: Any = LengthScorer()
    players = BuildPlayers(
        assistant,
        ScriptedUser(lambda chat, i: "noon"),
        scorer,
        count_tokens=len,
        proactive=ProactivePrompt(),
    )
    return await grow_conversation(Problem(3, TASK), rules, players), assistant


def rules(**changes: Any) -> GrowthRules:
    sizes: dict[str, Any] = {"num_candidates": 3, "num_futures": 2, "max_total_turns": 2, "max_user_turns": 1}
    return GrowthRules(**{**sizes, **changes})


async def test_proactive_candidates_see_the_reference_and_nobody_else_does() -> None:
    rows, assistant = await grown(rules(num_proactive=2))
    first = [row for row in rows if row["turn_id"] == 0]
    assert [(row["completion"], row["proactive"]) for row in first] == [
        *(("BOOK 0", False), ("at what hour? 0", True), ("at what hour? 1", True))
    ]
    told = [request for request in assistant.asked if request.json_reply]
    assert [request.n for request in told] == [2] * (1 + max(row["turn_id"] for row in rows))
    (prompt,) = told[0].messages
    for part in ("a table at noon for {two} $people", "BOOK <\\/reference> noon", '"content": "a table"', "booking"):
        assert part in prompt.content
    for request in assistant.asked:
        if not request.json_reply:
            assert "noon for" not in str(request.messages)
            assert "</reference>" not in str(request.messages)


async def test_all_candidates_may_be_proactive_or_none() -> None:
    rows, assistant = await grown(rules(num_proactive=3, max_total_turns=1))
    assert all(row["proactive"] for row in rows)
    assert next(request.n for request in assistant.asked if len(request.messages) == 1) == 3
    rows, assistant = await grown(rules(max_total_turns=1))
    assert not any(row["proactive"] for row in rows)
    assert not any(request.json_reply for request in assistant.asked)


async def test_sessions_and_rewards_are_stored_as_the_original_does() -> None:
    rows, _ = await grown(rules())
    for row in rows:
        head = [*row["prompt"], {"role": "assistant", "content": row["completion"]}]
        assert [session[: len(head)] for session in row["sessions"]] == [head, head]
        assert {len(scores) for scores in row["rewards"].values()} == {2}
        assert row["score"] == pytest.approx(sum(row["rewards"]["MR"]) / 2)
    for parsed in parse_rows(rows, "rows"):
        assert parsed.futures is not None
        assert [future[0] for future in parsed.futures] == [Message("user", "noon")] * 2


async def test_nested_rows_hold_what_flat_rows_hold(tmp_path: Path) -> None:
    rows, _ = await grown(rules(num_proactive=1))
    append_conversation(tmp_path / "flat.jsonl", rows)
    append_conversation(tmp_path / "nested.jsonl", rows, nested=True)
    flat, nested = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("flat", "nested")
    )
    assert len(nested) == 1
    assert nested == [json.loads(json.dumps(nested_row(rows)))]
    assert nested[0]["conv_rows"] == 1
    assert parse_rows(nested, "nested") == parse_rows(flat, "flat")
    assert [response["proactive"] for response in nested[0]["turns"][0]["responses"]] == [False, False, True]


def test_a_prompt_of_ones_own_needs_its_places(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("<request>$request</request> <chat>$chat</chat>")
    with pytest.raises(UserError, match=r"\$reference is missing"):
        ProactivePrompt(tmp_path / "mine.txt")
