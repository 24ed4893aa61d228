"""Where a future ends, what it is scored on, and that token ids only ever grow."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import pytest

from collab_megatron.config.sections.rollout import CutReply
from collab_megatron.errors import NoEngineLeft, RunError
from collab_megatron.rollout.future import Limits, play_future
from collab_megatron.rollout.rewards import Scorer
from collab_megatron.run_order import POSITION, RunPosition
from collab_megatron.types import Future, Generation, Message, PolicyTurn, RolloutStatus, ScoredConversation
from tests.rollout.fakes import (
    END,
    LIMITS,
    TASK,
    LengthScorer,
    LetterChat,
    ScriptedEngine,
    ScriptedUser,
    generation,
    players,
    policy_turn,
)


async def play(
    reply: PolicyTurn,
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
        name=NAME,
        sample_index=SAMPLE,
        simulate=simulate,
        limits=limits,
        players=players(engine, user, scorer),
    )


NAME, SAMPLE = "3/1/0/0", 5


def noon(chat: Sequence[Message], sample_index: int) -> str:
    return "noon"


async def test_the_last_policy_turn_is_kept_and_judged() -> None:
    engine, scorer = ScriptedEngine(["b?", "c!"]), LengthScorer()
    future = await play(policy_turn("a?"), engine=engine, user=ScriptedUser(noon), scorer=scorer)
    assert future.status is RolloutStatus.MAX_TURNS
    assert [m.role for m in future.messages] == ["user", "assistant", "user", "assistant"]
    assert scorer.seen[0].last_assistant == "c!"
    assert future.policy_tokens == 9  # three replies of two characters and an end token each
    assert future.reward == 6.0


async def test_termination_ends_the_chat_without_another_policy_turn() -> None:
    engine = ScriptedEngine(["b"])
    user = ScriptedUser(lambda chat, i: "thanks [TERMINATE]")
    future = await play(policy_turn("a"), engine=engine, user=user)
    assert future.status is RolloutStatus.TERMINATED
    assert engine.contexts == []
    assert user.asked == [5]


def _says(text: str, chat: Sequence[Message], sample_index: int) -> str:
    return text


async def test_the_termination_signal_is_a_setting() -> None:
    limits = replace(LIMITS, termination_signal="[[TERMINATE CHAT]]")
    for said, status in (("bye [[TERMINATE CHAT]]", "terminated"), ("bye [TERMINATE]", "max_turns")):
        user = ScriptedUser(partial(_says, said))
        future = await play(policy_turn("a"), engine=ScriptedEngine(["b"]), user=user, limits=limits)
        assert future.status == status


async def test_context_is_what_was_sampled_plus_glue() -> None:
    engine = ScriptedEngine(["bb", "cc"])
    await play(policy_turn("aa"), engine=engine, user=ScriptedUser(noon))
    prompt = [ord(c) for c in "book a table"]
    first = [*prompt, ord("a"), ord("a"), END, *(ord(c) for c in "noon")]
    assert engine.contexts[0] == first
    assert engine.contexts[1] == [*first, ord("b"), ord("b"), END, *(ord(c) for c in "noon")]


BROKEN = {
    "cut": policy_turn("aaaa", ended=False),
    "empty": policy_turn(" "),
    "silent": policy_turn("(hm)"),
    "unclosed": policy_turn("(hm"),
}


@pytest.mark.parametrize("reply", BROKEN.values(), ids=list(BROKEN))
@pytest.mark.parametrize("simulate", [True, False])
async def test_a_broken_reply_is_scored_without_a_future(reply: PolicyTurn, simulate: bool) -> None:
    engine, user, scorer = ScriptedEngine(["b"]), ScriptedUser(noon), LengthScorer()
    future = await play(reply, engine=engine, user=user, scorer=scorer, simulate=simulate)
    assert (future.status, future.messages, future.reward) == (RolloutStatus.TRUNCATED, (), 2.0)
    assert (engine.contexts, user.asked, len(scorer.seen)) == ([], [], 1)

    limits = replace(LIMITS, cut_reply="penalty", cut_penalty=-0.5)
    future = await play(reply, engine=engine, user=user, scorer=scorer, simulate=simulate, limits=limits)
    assert (future.status, future.scores, future.reward) == (RolloutStatus.TRUNCATED, {}, -0.5)
    assert (engine.contexts, user.asked, len(scorer.seen)) == ([], [], 1)  # nobody was asked


@pytest.mark.parametrize(("rule", "reward"), [("score", 4.0), ("penalty", -1.0), ("play", 6.0)])
async def test_a_broken_later_turn_ends_the_conversation(rule: CutReply, reward: float) -> None:
    class Stopping(ScriptedEngine):
        async def generate(self, input_ids: Sequence[int], **asked: Any) -> list[Generation]:
            await super().generate(input_ids, **asked)
            return [generation("bbbb", ended=len(self.contexts) > 1)]

    engine, user = Stopping(["b"]), ScriptedUser(noon)
    future = await play(policy_turn("a"), engine=engine, user=user, limits=replace(LIMITS, cut_reply=rule))
    assert future.reward == reward
    assert [turn.cut for turn in future.turns] == ([True, False] if rule == "play" else [True])
    assert len(user.asked) == len(future.turns)
    assert future.status is (RolloutStatus.MAX_TURNS if rule == "play" else RolloutStatus.TRUNCATED)


async def test_an_empty_last_turn_breaks_the_conversation_off_too() -> None:
    rules: tuple[tuple[CutReply, RolloutStatus], ...] = (
        ("score", RolloutStatus.TRUNCATED),
        ("play", RolloutStatus.MAX_TURNS),
    )
    for rule, status in rules:
        limits = replace(LIMITS, max_user_turns=1, cut_reply=rule)
        future = await play(policy_turn("a"), engine=ScriptedEngine([""]), user=ScriptedUser(noon), limits=limits)
        assert future.status is status


async def test_a_cut_reply_that_is_played_on_is_closed_by_the_glue() -> None:
    engine = ScriptedEngine(["b"])
    limits = replace(LIMITS, cut_reply="play")
    await play(policy_turn("aaaa", ended=False), engine=engine, user=ScriptedUser(noon), limits=limits)
    assert engine.contexts[0][len("book a table") :][:5] == [ord("a")] * 4 + [END]


async def test_every_policy_turn_has_a_name_of_its_own() -> None:
    engine = ScriptedEngine(["b"])
    await play(policy_turn("a"), engine=engine, user=ScriptedUser(noon))
    assert engine.names == ["3/1/0/0/1", "3/1/0/0/2"]


async def test_at_its_deadline_a_future_is_dropped_with_what_was_said() -> None:
    class SlowScorer(LengthScorer):
        async def score(self, conversation: ScoredConversation) -> dict[str, float]:
            await asyncio.sleep(60)
            raise AssertionError("it was cancelled")

    future = await asyncio.wait_for(
        play(
            policy_turn("a"),
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
            places.append(POSITION.get())
            return "noon"

    POSITION.set(RunPosition(3))
    await play(policy_turn("a"), engine=ScriptedEngine(["b"]), user=Looking(noon))
    assert places == [RunPosition(3, 1), RunPosition(3, 3)]


async def test_turn_limits() -> None:
    engine = ScriptedEngine(["b"])
    future = await play(
        policy_turn("a"), engine=engine, user=ScriptedUser(noon), limits=replace(LIMITS, max_assistant_turns=1)
    )
    assert future.messages == ()
    future = await play(
        policy_turn("a"), engine=engine, user=ScriptedUser(noon), limits=replace(LIMITS, max_user_turns=1)
    )
    assert len(future.messages) == 2


async def test_without_simulation_the_reply_is_scored_as_it_stands() -> None:
    user = ScriptedUser(noon)
    future = await play(policy_turn("a"), engine=ScriptedEngine(["b"]), user=user, simulate=False)
    assert user.asked == []
    assert future.reward == 2.0


async def test_failures_are_statuses_without_scores() -> None:
    def gone(chat: Sequence[Message], sample_index: int) -> str:
        raise RunError("user is gone")

    future = await play(policy_turn("a"), engine=ScriptedEngine(["b"]), user=ScriptedUser(gone))
    assert future.status is RolloutStatus.SIMULATOR_FAILED
    future_engine = await play(policy_turn("a"), engine=ScriptedEngine(["b"], fail_after=0), user=ScriptedUser(noon))
    assert future_engine.status is RolloutStatus.ENGINE_FAILED
    judged = await play(
        policy_turn("a"),
        engine=ScriptedEngine(["b"]),
        user=ScriptedUser(noon),
        scorer=LengthScorer(fail_if=lambda conversation: True),
    )
    assert judged.status is RolloutStatus.JUDGE_FAILED
    for failed in (future, future_engine, judged):
        assert failed.reward is None
        assert not failed.scores
        assert "gone" in failed.error


async def test_an_unforeseen_exception_is_a_status_and_a_bug_in_the_users_metric_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*_: object) -> str:
        raise ZeroDivisionError("half \ud800")

    class Broken:
        name = "accuracy"

        def score(self, conversation: ScoredConversation) -> float:
            return float(broken())

    ours, own = Scorer([Broken()], {"accuracy": 1.0}), Scorer([Broken()], {"accuracy": 1.0})
    reply = policy_turn("a")
    for user, scorer in ((broken, LengthScorer()), (noon, cast(Any, ours))):
        if scorer is ours:
            Broken.__module__ = "collab_megatron.rollout.rewards.accuracy"  # a shipped metric
        future = await play(reply, engine=ScriptedEngine(["b"]), user=ScriptedUser(user), scorer=scorer)
        assert (future.status, future.reward) == (RolloutStatus.UNEXPECTED_ERROR, None)
        assert future.error == "ZeroDivisionError: half \ufffd"
    assert [record.exc_info is not None for record in caplog.records] == [True, True]
    Broken.__module__ = "my_metrics"
    with pytest.raises(ZeroDivisionError) as caught:
        await play(reply, engine=ScriptedEngine(["b"]), user=ScriptedUser(noon), scorer=cast(Any, own))
    assert caught.value.__notes__ == ["in metric accuracy"]


async def test_without_engines_there_is_no_future_rather_than_a_failed_one() -> None:
    engine = ScriptedEngine(["b"], fail_after=0, failure=NoEngineLeft("no engine is left"))
    with pytest.raises(NoEngineLeft):
        await play(policy_turn("a"), engine=engine, user=ScriptedUser(noon))


async def test_a_conversation_that_outgrows_the_context_is_scored_as_truncated() -> None:
    future = await play(
        policy_turn("a"),
        engine=ScriptedEngine(["b"]),
        user=ScriptedUser(noon),
        limits=replace(LIMITS, max_context_tokens=20),
    )
    assert future.status is RolloutStatus.TRUNCATED
    assert future.reward is not None


async def test_nobody_but_the_policy_sees_its_thoughts() -> None:
    seen: list[str] = []

    def look(chat: Sequence[Message], sample_index: int) -> str:
        seen.extend(message.content for message in chat)
        return "noon"

    engine, scorer = ScriptedEngine(["(no hour)b?", "(noon!)c"]), LengthScorer()
    reply = policy_turn("(no day)a?")
    future = await play(reply, engine=engine, user=ScriptedUser(look), scorer=scorer)
    judged = [message.content for message in scorer.seen[0].messages]
    assert judged == ["book a table", "a?", "noon", "b?", "noon", "c"]
    assert scorer.seen[0].last_assistant == "c"
    assert [message.content for message in future.messages] == judged[2:]
    assert not any("(" in text or "no day" in text for text in seen)
    assert [(turn.thought, turn.reply) for turn in future.turns] == [("no hour", "b?"), ("noon!", "c")]
    assert all(0 < turn.begin_s <= turn.end_s for turn in future.turns)
    assert future.policy_tokens == len("(no day)a?(no hour)b?(noon!)c") + 3  # thoughts are tokens too
    assert [ord(c) for c in "(no day)a?"] == engine.contexts[0][len("book a table") :][
        :10
    ]  # the policy goes on with it


async def test_a_template_that_renders_chats_is_given_the_thoughts() -> None:
    class Noting(LetterChat):
        def grow(self, context_ids: Sequence[int], messages: Sequence[Message], user_text: str) -> list[int]:
            told.append([message.content for message in messages])
            return super().grow(context_ids, messages, user_text)

    told: list[list[str]] = []
    cast = replace(players(ScriptedEngine(["(hm)b?"]), ScriptedUser(noon)), chat=Noting())
    prompt_ids = LetterChat().prompt_ids(TASK.prompt)
    reply = policy_turn("(no day)a?")
    await play_future(
        TASK, prompt_ids, reply, index=0, name=NAME, sample_index=SAMPLE, simulate=True, limits=LIMITS, players=cast
    )
    assert told[1] == ["book a table", "(no day)a?", "noon", "(hm)b?"]


async def test_an_answer_without_tokens_is_that_requests_failure() -> None:
    class Silent(ScriptedEngine):
        async def generate(self, input_ids: Sequence[int], **asked: Any) -> list[Generation]:
            await super().generate(input_ids, **asked)
            return [Generation((), (), (), "stop")] * asked["n"]

    nothing = LetterChat().policy_turn((), Generation((), (), (), "stop"))
    user, scorer = ScriptedUser(noon), LengthScorer()
    first = await play(nothing, engine=ScriptedEngine(["b"]), user=user, scorer=scorer)
    later = await play(policy_turn("a?"), engine=Silent(["b"]), user=ScriptedUser(noon), scorer=scorer)
    for future in (first, later):
        assert future.status is RolloutStatus.ENGINE_FAILED
        assert future.error == "the engine returned no token ids"
        assert future.reward is None
    assert user.asked == []
    assert scorer.seen == []
    assert [message.role for message in later.messages] == ["user"]
