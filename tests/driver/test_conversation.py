"""Where a future ends, what it is scored on, and that token ids only ever grow."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from collab_megatron.driver.conversation import Limits, Seat, play_future
from collab_megatron.errors import NoEngineLeft, RunError
from collab_megatron.journal.place import PLACE, Place
from collab_megatron.types import Future, Generation, Message, RolloutStatus, ScoredConversation
from tests.driver.fakes import (
    END,
    LIMITS,
    TASK,
    LengthScorer,
    LetterChat,
    ScriptedEngine,
    ScriptedUser,
    generation,
    players,
)


async def play(
    reply: Generation,
    *,
    engine: ScriptedEngine,
    user: ScriptedUser,
    scorer: LengthScorer | None = None,
    simulate: bool = True,
    limits: Limits = LIMITS,
) -> Future:
    prompt_ids = LetterChat().prompt_ids(TASK.prompt)
    return await play_future(
        TASK,
        prompt_ids,
        reply,
        index=0,
        seat=SEAT,
        simulate=simulate,
        limits=limits,
        players=players(engine, user, scorer),
    )


SEAT = Seat("3/1/0/0", sample_index=5, step=3)


def noon(chat: Sequence[Message], sample_index: int) -> str:
    return "noon"


async def test_the_last_policy_turn_is_kept_and_judged() -> None:
    engine, scorer = ScriptedEngine(["b?", "c!"]), LengthScorer()
    future = await play(generation("a?"), engine=engine, user=ScriptedUser(noon), scorer=scorer)
    assert future.status is RolloutStatus.MAX_TURNS
    assert [m.role for m in future.messages] == ["user", "assistant", "user", "assistant"]
    assert scorer.seen[0].last_assistant == "c!"
    assert future.policy_tokens == 9  # three replies of two characters and an end token each
    assert future.reward == 6.0


async def test_termination_ends_the_chat_without_another_policy_turn() -> None:
    engine = ScriptedEngine(["b"])
    user = ScriptedUser(lambda chat, i: "thanks [TERMINATE]")
    future = await play(generation("a"), engine=engine, user=user)
    assert future.status is RolloutStatus.TERMINATED
    assert engine.contexts == []
    assert user.asked == [5]


async def test_context_is_what_was_sampled_plus_glue() -> None:
    engine = ScriptedEngine(["bb", "cc"])
    await play(generation("aa"), engine=engine, user=ScriptedUser(noon))
    prompt = [ord(c) for c in "book a table"]
    first = [*prompt, ord("a"), ord("a"), END, *(ord(c) for c in "noon")]
    assert engine.contexts[0] == first
    assert engine.contexts[1] == [*first, ord("b"), ord("b"), END, *(ord(c) for c in "noon")]


async def test_a_cut_reply_is_closed_by_the_glue() -> None:
    engine = ScriptedEngine(["b"])
    await play(generation("aaaa", ended=False), engine=engine, user=ScriptedUser(noon))
    assert engine.contexts[0][len("book a table") :][:5] == [ord("a")] * 4 + [END]


async def test_every_policy_turn_has_a_name_of_its_own() -> None:
    engine = ScriptedEngine(["b"])
    await play(generation("a"), engine=engine, user=ScriptedUser(noon))
    assert engine.names == ["3/1/0/0/1", "3/1/0/0/2"]


async def test_at_its_deadline_a_future_is_dropped_with_what_was_said() -> None:
    class SlowScorer(LengthScorer):
        async def score(self, conversation: ScoredConversation) -> dict[str, float]:
            await asyncio.sleep(60)
            raise AssertionError("it was cancelled")

    future = await asyncio.wait_for(
        play(
            generation("a"),
            engine=ScriptedEngine(["b"]),
            user=ScriptedUser(noon),
            scorer=SlowScorer(),
            limits=replace(LIMITS, future_timeout_s=0.05),
        ),
        timeout=5,
    )
    assert future.status is RolloutStatus.TIMED_OUT
    assert future.reward is None
    assert len(future.messages) == 4


async def test_turns_go_first_the_fewer_have_been_played() -> None:
    places = []

    class Looking(ScriptedUser):
        async def reply(self, task: object, chat: Sequence[Message], *, sample_index: int) -> str:
            places.append(PLACE.get())
            return "noon"

    await play(generation("a"), engine=ScriptedEngine(["b"]), user=Looking(noon))
    assert places == [Place(3, 1), Place(3, 3)]


async def test_turn_limits() -> None:
    engine = ScriptedEngine(["b"])
    future = await play(
        generation("a"), engine=engine, user=ScriptedUser(noon), limits=replace(LIMITS, max_assistant_turns=1)
    )
    assert future.messages == ()
    future = await play(
        generation("a"), engine=engine, user=ScriptedUser(noon), limits=replace(LIMITS, max_user_turns=1)
    )
    assert len(future.messages) == 2


async def test_without_simulation_the_reply_is_scored_as_it_stands() -> None:
    user = ScriptedUser(noon)
    future = await play(generation("a"), engine=ScriptedEngine(["b"]), user=user, simulate=False)
    assert user.asked == []
    assert future.reward == 2.0


async def test_failures_are_statuses_without_scores() -> None:
    def gone(chat: Sequence[Message], sample_index: int) -> str:
        raise RunError("user is gone")

    future = await play(generation("a"), engine=ScriptedEngine(["b"]), user=ScriptedUser(gone))
    assert future.status is RolloutStatus.SIMULATOR_FAILED
    future_engine = await play(generation("a"), engine=ScriptedEngine(["b"], fail_after=0), user=ScriptedUser(noon))
    assert future_engine.status is RolloutStatus.ENGINE_FAILED
    judged = await play(
        generation("a"),
        engine=ScriptedEngine(["b"]),
        user=ScriptedUser(noon),
        scorer=LengthScorer(fail_if=lambda conversation: True),
    )
    assert judged.status is RolloutStatus.JUDGE_FAILED
    for failed in (future, future_engine, judged):
        assert failed.reward is None
        assert not failed.scores
        assert "gone" in failed.error


async def test_without_engines_there_is_no_future_rather_than_a_failed_one() -> None:
    engine = ScriptedEngine(["b"], fail_after=0, failure=NoEngineLeft("no engine is left"))
    with pytest.raises(NoEngineLeft):
        await play(generation("a"), engine=engine, user=ScriptedUser(noon))


async def test_a_conversation_that_outgrows_the_context_is_scored_as_truncated() -> None:
    future = await play(
        generation("a"),
        engine=ScriptedEngine(["b"]),
        user=ScriptedUser(noon),
        limits=replace(LIMITS, max_context_tokens=20),
    )
    assert future.status is RolloutStatus.TRUNCATED
    assert future.reward is not None
