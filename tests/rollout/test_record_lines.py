"""A line of the record: what stands in it, where it comes from, and that docs/record.md describes every field."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from collab_megatron.config.sections import LLMSection, SimulatorSection, SimulatorsSection, UserSection
from collab_megatron.errors import RunError
from collab_megatron.limiter import AdaptiveLimiter
from collab_megatron.rollout.delivered_batches import DeliveredBatches
from collab_megatron.rollout.group import GroupRules, TreeId, grow_group, sample_replies
from collab_megatron.rollout.journal.store import Journal
from collab_megatron.rollout.journaled_engine import JournaledEngine
from collab_megatron.rollout.llm import Gateway, user_simulator
from collab_megatron.rollout.record_lines import SCHEMA, held_out_line, tree_line
from collab_megatron.rollout.rewards import Scorer
from collab_megatron.rollout.rewards.interactivity import Interactivity
from collab_megatron.rollout.rewards.token_amount import TokenAmount
from collab_megatron.types import CallRecord, Future, Generation, Group, Message, PolicyTurn, Reply, RolloutStatus
from tests.rollout.fakes import LIMITS, TASK, ScriptedEngine, ScriptedUser, players
from tests.rollout.llm.misbehaving import MisbehavingEndpoint

DOCS = Path(__file__).parents[2] / "docs" / "record.md"
TREE_ID = TreeId(3, 1, first_sample=100)
RULES = GroupRules(2, 4, min_replies=2, min_futures=1, group_timeout_s=60, advantage_eps=0.05, min_group_std=0.01)
PRICES: dict[str, Any] = {"input_usd_per_mtoken": 10.0, "output_usd_per_mtoken": 100.0}
MARKS = {"understanding": 1, "clarification": 0.5, "suggestion": 0}


class Answers:
    """What the endpoint's models answer; the judge's first answer cannot be used."""

    def __init__(self) -> None:
        self.judged = 0

    def __call__(self, body: dict[str, Any]) -> str:
        if body["model"] != "judge":
            return json.dumps({"thought": f"{body['model']} thinks", "response": "go on"})
        self.judged += 1
        return "no marks today" if self.judged == 1 else json.dumps({"thought": "it asked", **MARKS})


async def grow(url: str, journal: Journal) -> dict[str, Any]:
    """The line of a tree that a mixture of two users and a judge played over HTTP."""

    def part(name: str) -> dict[str, Any]:
        return {"model": f"hosted_vllm/{name}", "api_base": url, "api_key_env": None, **PRICES}

    user = UserSection(**part("a"), mixture=(SimulatorSection(**part("b")),))
    simulators = SimulatorsSection(user=user, judge=LLMSection(**part("judge"), answer_once=False))
    gateway = Gateway({"user": user, "judge": cast(LLMSection, simulators.judge)}, 7, journal=journal)
    try:
        engine = JournaledEngine(ScriptedEngine(["(why?)ok", "b"]), journal, AdaptiveLimiter(1000), max_staleness=0)
        scorer = Scorer(
            [Interactivity(gateway.role("judge")), TokenAmount()], {"interactivity": 1.0, "token_amount": 0.0}
        )
        cast_of = replace(
            players(cast(Any, engine), ScriptedUser(lambda chat, index: "")),
            user=user_simulator(simulators, gateway),
            scorer=scorer,
        )
        prompt_ids, turns = await sample_replies(TASK, TREE_ID, 2, LIMITS, cast_of)
        group = await grow_group(TASK, prompt_ids, turns, TREE_ID, rules=RULES, limits=LIMITS, players=cast_of)
    finally:
        await gateway.close()
    line: dict[str, Any] = json.loads(tree_line(4, group, TREE_ID, replaced=False, trained=True))
    return line


async def test_a_line_tells_who_was_asked_what_when_and_what_it_cost(tmp_path: Path) -> None:
    began = time.time()
    with MisbehavingEndpoint(Answers()) as endpoint:
        with closing(Journal(tmp_path / "j.sqlite", replay="auto", lineage="x")) as journal:
            line = await grow(endpoint.url, journal)
            asked = sum(endpoint.counts.values())
        with closing(Journal(tmp_path / "j.sqlite", replay="only", lineage="x")) as journal:
            again = await grow(endpoint.url, journal)
        assert sum(endpoint.counts.values()) == asked
    ended = time.time()
    assert line["schema"] == SCHEMA
    assert (line["step"], line["begun_for_step"], line["slot"]) == (4, 4, 1)
    assert line["prompt_ids"] == [ord(c) for c in "book a table"]
    assert [reply["thought"] for reply in line["replies"]] == ["why?", ""]
    futures = [future for reply in line["replies"] for future in reply["futures"]]
    calls = [call for future in futures for call in future["calls"]]
    assert all(began <= call["begin_s"] <= call["end_s"] <= ended for call in calls)
    users = [[call for call in future["calls"] if not call["metric"]] for future in futures]
    assert {len(of_future) for of_future in users} == {2}  # one for each user turn
    assert {tuple({(call["role"], call["model"]) for call in of_future}) for of_future in users} == {
        (("user", "hosted_vllm/a"),),
        (("user-1", "hosted_vllm/b"),),
    }
    assert {call["thought"] for of_future in users for call in of_future} == {"a thinks", "b thinks"}
    judges = [call for call in calls if call["metric"]]
    assert {(call["role"], call["metric"], call["answered_by"]) for call in judges} == {
        ("judge", "interactivity", "judge")
    }
    assert all((call["thought"], call["marks"]) == ("it asked", MARKS) for call in judges)
    assert sorted(call["requests"] for call in judges) == [1] * 7 + [2]  # the one that could not be used is in its call
    assert sum(call["requests"] for call in calls) == asked
    tokens = {call["prompt_tokens"] for call in judges if call["requests"] == 1}
    (twice,) = (call["prompt_tokens"] for call in judges if call["requests"] == 2)
    assert {twice} == {2 * count for count in tokens}
    assert all(call["cost_usd"] > 0 and not call["replayed"] for call in calls)
    # every policy turn of a future: two after the trained reply
    for future in futures:
        assert [message["role"] for message in future["messages"]] == ["user", "assistant"] * 2
        assert [turn["text"] for turn in future["turns"]] == [m["content"] for m in future["messages"][1::2]]
        for turn in future["turns"]:
            assert len(turn["token_ids"]) == len(turn["logprobs"]) > 0
            assert turn["version_runs"] == [[0, len(turn["token_ids"])]]
            assert began <= turn["begin_s"] <= turn["end_s"] <= ended
            assert not turn["replayed"]
    # from the journal: the same words, asked of nobody
    replayed = [call for reply in again["replies"] for future in reply["futures"] for call in future["calls"]]
    assert all(call["replayed"] and call["requests"] == 0 and call["cost_usd"] == 0 for call in replayed)
    assert sorted(call["thought"] for call in replayed) == sorted(call["thought"] for call in calls)
    assert all(reply["replayed"] for reply in again["replies"])
    assert all(turn["replayed"] for reply in again["replies"] for f in reply["futures"] for turn in f["turns"])
    described = set(re.findall(r"^\| `(\w+)`", DOCS.read_text(), re.M))
    assert set(names(line)) - set(MARKS) - {"interactivity", "token_amount"} == described


async def test_a_call_without_an_answer_is_kept_with_its_reason(tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> str:
        return "no marks" if body["model"] == "judge" else '{"thought": "", "response": "[TERMINATE]"}'

    with (
        MisbehavingEndpoint(answer) as endpoint,
        closing(Journal(tmp_path / "j.sqlite", replay="auto", lineage="x")) as journal,
    ):
        line = await grow(endpoint.url, journal)
    for future in (future for reply in line["replies"] for future in reply["futures"]):
        *_, call = future["calls"]
        assert future["status"] == "judge_failed"
        assert (call["metric"], call["thought"]) == ("interactivity", "")
        assert call["error"] == future["error"] != ""
        assert call["requests"] > 1


def test_a_batch_in_another_versions_form_is_refused(tmp_path: Path) -> None:
    with closing(Journal(tmp_path / "j.sqlite", replay="auto", lineage="x")) as journal:
        old = {"trees": [[0, 0, False]], "answer": {}, "lines": [b'{"step":0}\n']}
        journal.record_delivery(4096, 0, msgspec.msgpack.encode(old))
        with pytest.raises(RunError, match="the batch of step 1 in the format of another version"):
            DeliveredBatches(journal, 0, 1).get(0)


def names(value: Any) -> Iterator[str]:
    """Every field's name, however deep."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from names(item)
    elif isinstance(value, list):
        for item in value:
            yield from names(item)


def test_what_json_does_not_have_is_written_out_and_ends_no_run() -> None:
    call = CallRecord("judge", "m", 0.0, 1.0, thought="half \ud83d", marks={"id": 2**70, "clarity": 1, "\ud83d": 0.5})
    messages = (Message("user", "so \ud83d"),)
    future = Future(0, RolloutStatus.MAX_TURNS, messages, calls=(call,))
    turn = PolicyTurn("", "yes", "yes", cut=False, generation=Generation((1,), (-0.5,), (0,), "stop"))
    line = held_out_line(3, Group(TASK, (1,), (Reply(turn, (future,)),), kept=True))
    assert line.startswith(b'{"schema":1,"step":3,')  # the recorder reads the step there
    (told,) = json.loads(line)["replies"][0]["futures"]
    assert told["messages"] == [{"role": "user", "content": r"so \ud83d"}]
    (said,) = told["calls"]
    assert (said["thought"], said["marks"]) == (r"half \ud83d", {"id": str(2**70), "clarity": 1, r"\ud83d": 0.5})
