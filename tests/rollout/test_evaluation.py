"""Evaluation: which tasks, how they begin, what is counted, and what is written down."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from collab_megatron.config.sections import EvaluationSection
from collab_megatron.errors import BudgetSpent, EvaluationFailed, NoEngineLeft, RunError
from collab_megatron.figures import merged, values
from collab_megatron.rollout.api_model import ApiModel
from collab_megatron.rollout.evaluation import Evaluation, evaluate
from collab_megatron.rollout.evaluation_tasks import sample_tasks
from collab_megatron.rollout.future import Players
from collab_megatron.rollout.record_lines import held_out_line
from collab_megatron.rollout.transcripts import keep_newest, transcript_file, write_transcripts
from collab_megatron.types import Message, RolloutStatus, Task
from collab_megatron.wire.protocol import LOST_CONVERSATIONS, Tally, require_most
from tests.rollout.fakes import LIMITS, LengthScorer, ScriptedEngine, ScriptedUser, players

OPENING = (Message("system", "be kind"), Message("user", "book a table"))
LATER = (*OPENING, Message("assistant", "when?"), Message("user", "at noon"))
WEIGHTS = {"accuracy": 1.0}


def tasks(count: int, *, later_every: int = 0) -> list[Task]:
    return [
        Task(
            f"task-{number}",
            LATER if later_every and number % later_every == 0 else OPENING,
            f"request {number}",
            "BOOK",
            metadata={"ambiguous": number % 2 == 0, "level": 3},
        )
        for number in range(count)
    ]


def ends(chat: Sequence[Message], sample_index: int) -> str:
    return "[TERMINATE]"


def opens_then_ends(chat: Sequence[Message], sample_index: int) -> str:
    return "[TERMINATE]" if any(message.role == "assistant" for message in chat) else f"I want {sample_index}"


async def play(held_out: list[Task], cast: Players, *, shard: int = 0, shards: int = 1, **rest: Any) -> Evaluation:
    within = rest.pop("within", nullcontext)
    given: dict[str, Any] = {name: rest.pop(name) for name in ("users", "api") if name in rest}
    section = EvaluationSection(**rest)
    given |= {"weights": WEIGHTS, "limits": LIMITS, "players": cast, "shard": shard, "shards": shards, "within": within}
    return await evaluate(held_out, evaluation=section, **given)


def require(*played: Evaluation) -> None:
    require_most([part.tally for part in played], LOST_CONVERSATIONS, EvaluationFailed)


def names(played: Evaluation) -> list[str]:
    return [group.task.task_id for group in played.groups]


def test_the_sample_is_a_function_of_seed_and_names() -> None:
    all_tasks = tasks(50)
    few, more = (sample_tasks(all_tasks, count, 1) for count in (10, 20))
    assert few == sample_tasks(all_tasks, 10, 1)
    assert [number for number, _ in few] == sorted(number for number, _ in few) != list(range(10))
    assert {number for number, _ in few} < {number for number, _ in more}
    assert few != sample_tasks(all_tasks, 10, 2)
    assert all(all_tasks[number] is task for number, task in few)
    backwards = sample_tasks(all_tasks[::-1], 10, 1)
    assert {task.task_id for _, task in backwards} == {task.task_id for _, task in few}
    assert sample_tasks(all_tasks, 1000, 7) == list(enumerate(all_tasks))


async def test_shards_play_the_same_tasks_as_one_process() -> None:
    held_out = tasks(30, later_every=3)
    cast = players(ScriptedEngine(["a?"]), ScriptedUser(ends))
    whole = await play(held_out, cast, num_tasks=12)
    parts = [await play(held_out, cast, num_tasks=12, shard=shard, shards=3) for shard in range(3)]
    assert sorted(name for part in parts for name in names(part)) == sorted(names(whole))
    together = values(merged(part.figures for part in parts))
    assert {**together, "wall_s": 0} == pytest.approx({**values(whole.figures), "wall_s": 0})


async def test_openings_and_later_turns_are_reported_apart() -> None:
    """LengthScorer: system, user, reply, end are 4 messages; a later turn has two more."""
    cast = players(ScriptedEngine(["a?"]), ScriptedUser(ends))
    figures = values((await play(tasks(6, later_every=3), cast)).figures)
    assert (figures["openings/accuracy"], figures["later/accuracy"]) == (4.0, 6.0)
    assert figures["accuracy"] == pytest.approx((4 * 4.0 + 2 * 6.0) / 6)
    assert (figures["openings/conversations"], figures["later/conversations"]) == (4, 2)
    assert figures["openings/mr"] == 4.0
    # of the openings, as ever: tasks 1, 2, 4, 5
    assert (figures["clarify_rate"], figures["clarify_rate_ambiguous"]) == (1.0, 1.0)
    assert not [name for name in figures if "/clarify" in name]
    alike = values((await play(tasks(6), cast)).figures)
    assert not [name for name in alike if "/" in name]


async def test_a_simulated_opening_takes_the_place_of_the_datasets_prompt() -> None:
    engine, user = ScriptedEngine(["a?"]), ScriptedUser(opens_then_ends)
    played = await play(tasks(4, later_every=2), players(engine, user), simulated_opening=True)
    assert names(played) == ["task-1", "task-3"]  # later turns of the same conversations would open alike
    prompts = [group.task.prompt for group in played.groups]
    assert prompts == [(OPENING[0], Message("user", f"I want {index}")) for index in (-2, -4)]
    figures = values(played.figures)
    assert figures["clarify_rate"] == 1.0
    assert "clarify_rate_ambiguous" not in figures  # what the dataset knows is about its own opening
    assert "clarify_rate_complete" not in figures
    assert played.groups[0].task.metadata == {"level": 3}
    only_later = await play(tasks(4, later_every=1), players(engine, user), simulated_opening=True)
    assert len(only_later.groups) == 4


async def test_an_opening_that_ends_the_chat_is_a_failed_conversation() -> None:
    played = await play(tasks(1), players(ScriptedEngine(["a?"]), ScriptedUser(ends)), simulated_opening=True)
    (group,) = played.groups
    assert group.replies_G[0].futures_K[0].status is RolloutStatus.SIMULATOR_FAILED
    assert "instead of opening it" in group.error
    assert values(played.figures)["conversations_failed"] == 1


async def test_a_reply_that_cannot_be_sampled_fails_its_conversation_alone() -> None:
    """Each conversation asks the engine once: the user ends it after the first reply."""
    cast = players(ScriptedEngine(["a?"], fail_after=3), ScriptedUser(ends))
    played = await play(tasks(5), cast, max_concurrency=1)
    figures = values(played.figures)
    assert (figures["conversations"], figures["conversations_failed"]) == (5, 2)
    assert figures["accuracy"] == 4.0
    require(played)
    statuses = [group.replies_G[0].futures_K[0].status for group in played.groups]
    assert statuses[3:] == [RolloutStatus.ENGINE_FAILED] * 2
    with pytest.raises(EvaluationFailed, match="5 of 5 held-out conversations failed; engine is gone"):
        require(await play(tasks(5), players(ScriptedEngine(["a?"], fail_after=0), ScriptedUser(ends))))


async def test_an_unforeseen_exception_fails_its_conversation_alone() -> None:
    def unruly(chat: Sequence[Message], sample_index: int) -> str:
        if sample_index == -1:
            raise KeyError(sample_index)
        return opens_then_ends(chat, sample_index)

    cast = players(ScriptedEngine(["a"]), ScriptedUser(unruly))
    for simulated in (True, False):  # in the opening; in the future of its reply
        played = await play(tasks(3), cast, simulated_opening=simulated)
        assert played.tally == Tally(3, 1, "KeyError: -1")
        assert played.groups[0].replies_G[0].futures_K[0].status is RolloutStatus.UNEXPECTED_ERROR
    assert cast.unexpected.count == 2


async def test_an_engine_that_is_gone_ends_the_evaluation() -> None:
    engine = ScriptedEngine(["a?"], fail_after=0, failure=NoEngineLeft("none"))
    with pytest.raises(NoEngineLeft):
        await play(tasks(5), players(engine, ScriptedUser(ends)))


async def test_what_is_under_way_at_the_deadline_is_counted_as_failed() -> None:
    class Slow(LengthScorer):
        async def score(self, conversation: Any) -> dict[str, float]:
            if conversation.task.task_id != "task-0":
                await asyncio.sleep(30)
            return await super().score(conversation)

    played = await play(tasks(3), players(ScriptedEngine(["a?"]), ScriptedUser(ends), Slow()), timeout_s=0.3)
    figures = values(played.figures)
    assert (figures["conversations"], figures["conversations_failed"], figures["accuracy"]) == (3, 2, 4.0)
    with pytest.raises(EvaluationFailed, match=r"2 of 3 .* failed; the evaluation reached its deadline of 0\.3 s"):
        require(played)
    assert len(asyncio.all_tasks()) == 1


async def test_a_spent_budget_begins_no_more_and_keeps_what_is_there() -> None:
    user = ScriptedUser(ends)

    @asynccontextmanager
    async def room() -> AsyncIterator[None]:
        if len(user.asked) >= 2:
            raise BudgetSpent("too dear")
        yield

    played = await play(tasks(5), players(ScriptedEngine(["a?"]), user), max_concurrency=1, within=room)
    assert (played.stop, played.wanted, len(played.groups)) == ("too dear", 5, 2)
    assert values(played.figures)["conversations"] == 2


async def test_every_conversation_is_written_down(tmp_path: Path) -> None:
    scorer = LengthScorer(fail_if=lambda conversation: conversation.task.task_id == "task-1")
    played = await play(tasks(2), players(ScriptedEngine(["a?"]), ScriptedUser(ends), scorer))
    path = transcript_file(tmp_path / "evaluations" / "rl", 7, 1)
    assert path.name == "step_00000007.shard1.jsonl"
    write_transcripts(path, 7, played.groups)
    write_transcripts(path, 7, played.groups)  # an evaluation that is asked for again
    good, bad = (json.loads(line) for line in path.read_text().splitlines())
    assert (good["step"], good["task_id"], good["ambiguous"]) == (7, "task-0", True)
    assert [message["content"] for message in good["prompt"]] == ["be kind", "book a table"]
    (reply,) = good["replies"]
    (future,) = reply["futures"]
    assert (reply["text"], reply["mr"], future["status"]) == ("a?", 4.0, "terminated")
    assert (future["scores"], future["reward"]) == ({"accuracy": 4.0}, 4.0)
    assert [message["role"] for message in future["messages"]] == ["user"]
    assert (bad["kept"], bad["error"], bad["replies"][0]["mr"]) == (False, "judge is gone", None)
    assert bad["replies"][0]["futures"][0]["status"] == "judge_failed"


def test_the_newest_transcripts_and_the_first_are_kept(tmp_path: Path) -> None:
    for step in range(0, 60, 10):
        for shard in (0, 1):
            write_transcripts(transcript_file(tmp_path, step, shard), step, [])
    keep_newest(tmp_path, 2, 0, step=50)
    kept = sorted(file.name for file in tmp_path.iterdir() if "shard" not in file.name)
    assert kept == ["step_00000000.jsonl", "step_00000040.jsonl", "step_00000050.jsonl"]
    assert len(list(tmp_path.glob("*.shard1.jsonl"))) == 6


def test_transcripts_of_an_attempt_that_was_gone_back_behind_do_not_push_out_the_new_ones(tmp_path: Path) -> None:
    for step in (0, 20, 30, 40):
        write_transcripts(transcript_file(tmp_path, step, 0), step, [])
    for step in (0, 10, 20):  # the run starts over
        write_transcripts(transcript_file(tmp_path, step, 0), step, [])
        keep_newest(tmp_path, 1, 0, step=step)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["step_00000000.jsonl", "step_00000020.jsonl"]


async def test_a_disk_that_refuses_is_a_run_error(tmp_path: Path) -> None:
    (tmp_path / "evaluations").write_text("a file in the way")
    with pytest.raises(RunError, match="cannot write"):
        write_transcripts(transcript_file(tmp_path / "evaluations", 0, 0), 0, [])


async def test_every_user_plays_every_task_and_has_figures_of_its_own() -> None:
    def second(chat: Sequence[Message], sample_index: int) -> str:
        return "[TERMINATE]" if len(chat) > 4 else "no idea"

    engine, other = ScriptedEngine(["a?"]), ScriptedUser(second)
    cast = players(engine, ScriptedUser(ends))
    played = await play(tasks(4), cast, users={"": cast.user, "vague": other})
    figures = values(played.figures)
    assert (figures["accuracy"], figures["users/vague/accuracy"]) == (4.0, 6.0)
    assert (figures["users/vague/conversations"], figures["conversations"]) == (4, 4)
    assert [name for name in figures if name.endswith("wall_s")] == ["wall_s"]
    assert (played.wanted, played.done, list(played.others)) == (8, 8, ["vague"])
    assert [group.task.task_id for group in played.others["vague"]] == names(played)
    assert sorted(set(other.asked)) == [-4, -3, -2, -1]  # the same sample index as with the other user


async def test_a_failure_with_a_further_user_counts() -> None:
    def fails(chat: Sequence[Message], sample_index: int) -> str:
        raise RunError("user is gone")

    cast = players(ScriptedEngine(["a?"]), ScriptedUser(ends))
    played = await play(tasks(2), cast, users={"": cast.user, "absent": ScriptedUser(fails)})
    assert played.tally == Tally(4, 2, "user is gone")
    assert values(played.figures)["conversations_failed"] == 0


async def test_an_api_model_plays_the_policy() -> None:
    class Llm:
        def __init__(self) -> None:
            self.asked: list[tuple[int, list[str]]] = []

        async def complete(self, request: Any) -> list[Any]:
            self.asked.append((request.sample_index, [message.role for message in request.messages]))
            return [request.parse("<think>no day</think>which day?")]

    def answers_once(chat: Sequence[Message], sample_index: int) -> str:
        return "[TERMINATE]" if len(chat) > 3 else "monday"

    llm, engine = Llm(), ScriptedEngine([])
    api = ApiModel(llm, lambda text: [ord(letter) for letter in text], ("<think>", "</think>"))
    played = await play(tasks(1), players(engine, ScriptedUser(answers_once)), api=api)
    assert engine.contexts == []
    turns = ["system", "user", "assistant", "user"]
    assert llm.asked == [(-1, turns[:2]), (-1, turns)]
    (reply,) = played.groups[0].replies_G
    assert (reply.text, reply.thought) == ("which day?", "no day")
    (future,) = reply.futures_K
    assert future.status is RolloutStatus.TERMINATED
    assert future.policy_tokens == 2 * len("<think>no day</think>which day?")
    assert values(played.figures)["clarify_rate"] == 1.0
    assert json.loads(held_out_line(0, played.groups[0]))["replies"][0]["logprobs"] == []


async def test_an_api_model_that_does_not_answer_fails_its_conversation_alone() -> None:
    class Gone:
        async def complete(self, request: Any) -> list[Any]:
            raise RunError("no answer")

    api = ApiModel(Gone(), lambda text: [1], ("<think>", "</think>"))
    played = await play(tasks(2), players(ScriptedEngine([]), ScriptedUser(ends)), api=api)
    assert played.tally == Tally(2, 2, "no answer")
