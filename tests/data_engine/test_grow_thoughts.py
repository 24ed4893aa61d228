"""A dataset's assistant may think: its rows, the simulated user and the judges are given its replies alone."""

from __future__ import annotations

from typing import Any

import pytest

from collab_megatron.data_engine.grow import BuildPlayers, GrowthRules, grow_conversation
from collab_megatron.data_engine.problems import Problem
from collab_megatron.rollout.llm import SimulatorError
from collab_megatron.types import LLMRequest, T
from tests.rollout.fakes import TASK, LengthScorer, ScriptedUser


class Assistant:
    """Gives `texts` as candidates, and the first of them later on."""

    def __init__(self, *texts: str) -> None:
        self._texts = texts

    async def complete(self, request: LLMRequest[T]) -> list[T]:
        assert not any("<think>" in message.content for message in request.messages)
        return [request.parse(text) for text in (self._texts if request.n > 1 else self._texts[:1])]


async def grown(*texts: str) -> tuple[list[dict[str, Any]], LengthScorer]:
    scorer: Any = LengthScorer()
    user = ScriptedUser(lambda chat, i: f"noon {chat[-1].content}")
    players = BuildPlayers(Assistant(*texts), user, scorer, count_tokens=len)
    rules = GrowthRules(num_candidates=2, num_futures=1, max_total_turns=1, max_user_turns=1)
    return await grow_conversation(Problem(0, TASK), rules, players), scorer


async def test_thoughts_stay_out_of_a_built_dataset() -> None:
    rows, scorer = await grown("<think>no hour</think>which day?", "<think>never ends")
    assert [row["completion"] for row in rows] == ["which day?"]
    assert [turn["content"] for turn in rows[0]["sessions"][0][:3]] == [
        *("book a table", "which day?", "noon which day?")
    ]
    assert not any("no hour" in message.content for seen in scorer.seen for message in seen.messages)


async def test_an_assistant_that_only_thinks_fails_its_conversation() -> None:
    with pytest.raises(SimulatorError, match="proposed no reply"):
        await grown("<think>never ends", "<think>done</think>")
