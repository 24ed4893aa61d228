"""Whole trees against endpoints that misbehave: the steps end, no failure is learnt from, every fault is counted."""

from __future__ import annotations

import asyncio
import io
import logging
import sqlite3
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from collab_megatron.config import RLConfig
from collab_megatron.config.sections import (
    DataSection,
    DeploymentSection,
    DriverSection,
    HealthSection,
    JudgeSection,
    ModelSection,
    RewardSection,
    RolloutSection,
    RunSection,
    SimulatorsSection,
    UserSection,
)
from collab_megatron.data.parquet import write_tasks
from collab_megatron.figures import merged, values
from collab_megatron.rollout.clients import open_clients, open_journal
from collab_megatron.rollout.journal.packing import unpack_texts
from collab_megatron.rollout.record_files import RecordWriter, read_trees
from collab_megatron.rollout.service import Service
from collab_megatron.types import Message, Task
from collab_megatron.wire.protocol import Answer, Request
from tests.rollout.llm.calls import HELLO
from tests.rollout.llm.misbehaving import ALL_FAULTS, COUNTER_OF, FAULTY, MisbehavingEndpoint, faults_at
from tests.rollout.stand_in import StandIn, Vocabulary, judge_text, user_text

pytestmark = pytest.mark.slow

KEY = "sk-drill-0123456789abcdef"
PROSE = "Certainly, that sounds like a fine plan to me."  # no JSON: nobody can use it
QUOTED = "quotes_key"  # status 400, and the provider's words hold the key
ROLES = ("user", "judge")
STEPS, PROMPTS, REPLIES, FUTURES = 2, 6, 4, 2
DOWN_S = 3.0
# a third; those that the client waits for are rarer, so that its deadline can be far above what a busy machine needs
FAULTS = {**faults_at(0.33), "slow": 0.01, "hang": 0.01, QUOTED: 0.02}
WEIGHTS = {"accuracy": 1.0, "interactivity": 1.0, "token_amount": -0.1}

FAILED_ATTEMPTS = ("rate_limited", "server_errors", "rejected", "timeouts", "connection_errors", "bad_bodies")
MALFORMED = ("empty", "wrong_role", "too_long", "unreadable")

# what an endpoint answers to a task with this word in its request
MUTE_USER, MUTE_JUDGE, FICKLE_USER = "lighthouse", "submarine", "carousel"


class Drill(MisbehavingEndpoint):
    """Says as well what nobody can read, and quotes the key that it was sent."""

    def __init__(self, seed: int) -> None:
        super().__init__(self._say, seed=seed)
        self.unreadable = 0  # replies without JSON
        self._vocabulary = Vocabulary()

    def _say(self, body: dict[str, Any]) -> str:
        role, messages = body["model"], body["messages"]
        if mute(role, messages[-1]["content"]):
            self.unreadable += 1
            return PROSE
        if role == "user":
            return user_text(self._vocabulary, messages, body["seed"], 0)
        return judge_text(messages, body["seed"], 0)

    async def _act(self, kind: str, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if kind == QUOTED:
            error = {"message": f"no such thing for {request.headers['Authorization']}", "type": "x", "code": "x"}
            return web.json_response({"error": error}, status=400)
        return await super()._act(kind, request, body)


def mute(role: str, prompt: str) -> bool:
    if role == "judge":
        return MUTE_JUDGE in prompt
    replies = [line for line in prompt.splitlines() if line.startswith('{"role": "assistant"')]
    return MUTE_USER in prompt or (FICKLE_USER in prompt and zlib.crc32(replies[0].encode()) % 2 == 0)


def tasks() -> list[Task]:
    words = [MUTE_USER, MUTE_JUDGE, FICKLE_USER, "harbour", "meadow", "windmill"]
    assert len(words) == PROMPTS  # each task once a step
    return [
        Task(word, (Message("user", "please book a room"),), f"book a room near the {word} at noon", "BOOK noon")
        for word in words
    ]


def config_for(folder: Path, model: Path, user: Drill, dead: Drill, judge: Drill) -> RLConfig:
    limits: dict[str, Any] = {
        "api_key_env": "DRILL_API_KEY",
        "timeout_s": 5.0,
        "deadline_s": 30.0,
        "max_attempts": 5,
        "cooldown_s": 20.0,
        "max_concurrency": 32,
        "max_tokens": 64,
        "input_usd_per_mtoken": 1.0,
        "output_usd_per_mtoken": 2.0,
    }
    # every future with calls of its own: each failure is counted where it was injected
    other = DeploymentSection(model="hosted_vllm/user", api_base=dead.url, api_key_env="DRILL_API_KEY")
    write_tasks(folder / "train.parquet", tasks())
    return RLConfig(
        run=RunSection(dir=folder / "run"),
        model=ModelSection(path=str(model)),
        data=DataSection(train=folder / "train.parquet"),
        simulators=SimulatorsSection(
            user=UserSection(
                model="hosted_vllm/user",
                api_base=user.url,
                deployments=(other,),
                first_turns_together=False,
                **limits,
            ),
            judge=JudgeSection(model="hosted_vllm/judge", api_base=judge.url, answer_once=False, **limits),
            health=HealthSection(min_replies=1),
        ),
        reward=RewardSection(metric_weights=WEIGHTS),
        rollout=RolloutSection(
            prompts_per_step=PROMPTS,
            num_replies=REPLIES,
            num_repeat_rollouts=FUTURES,
            equal_replies="apart",
            max_user_turns=1,
            max_new_tokens=16,
        ),
        driver=DriverSection(future_timeout_s=100.0, group_timeout_s=100.0),
    )


@contextmanager
def endpoints() -> Iterator[tuple[Drill, Drill, Drill]]:
    """The user's, which misbehaves; its second, which is down for good; the judge's."""
    user, dead, judge = Drill(seed=70), Drill(seed=0), Drill(seed=5)
    with user, dead, judge:
        dead.down_until = float("inf")
        yield user, dead, judge


@asynccontextmanager
async def policy() -> AsyncIterator[tuple[StandIn, str]]:
    engine = StandIn(latency_s=0.005, seed=1)
    runner = web.AppRunner(engine.app(), access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield engine, "http://{}:{}".format(*runner.addresses[0])
    finally:
        await runner.cleanup()


async def play(config: RLConfig, user: Drill, dead: Drill, judge: Drill) -> tuple[list[Answer], dict[str, int]]:
    """The steps as the trainer asks for them, and what was paid for. In the second everything is down at first."""
    journal = open_journal(config)
    recorder = RecordWriter(config.run.conversations_dir, config.record, first_step=1)
    answers = []
    with closing(journal):
        async with (
            policy() as (engine, url),
            open_clients(config, engine_urls=(), max_context_tokens=256, journal=journal) as clients,
        ):
            service = Service(config, clients, recorder)
            for role in ROLES:  # the client's imports would hold up the first wave of calls
                await clients.gateway.role(role).complete(HELLO)
            for drill in (user, judge):
                drill.faults = FAULTS
            for step in range(STEPS):
                engine._version = str(step)
                if step == 1:
                    user.down_until = judge.down_until = time.monotonic() + DOWN_S
                until = time.monotonic() + 60
                while (answer := await service.answer(Request("step", step, step, (url,)))).pending:
                    assert time.monotonic() < until
                answers.append(answer)
            await service.close()
        return answers, {role: spent.calls for (role, _), spent in journal.spent().items()}


@dataclass(frozen=True)
class Drilled:
    """What the steps left behind."""

    run_dir: Path
    answers: list[Answer]
    counts: dict[str, Counter[str]]  # role -> what its endpoints did, by kind
    unreadable: dict[str, int]  # role -> replies without JSON
    paid: dict[str, int]  # role -> answers that the journal has counted
    said: str  # logs and terminal

    @property
    def figures(self) -> dict[str, float]:
        """The dashboard's, over all steps."""
        return values(merged(answer.figures for answer in self.answers))

    @property
    def trees(self) -> list[dict[str, Any]]:
        return list(read_trees(self.run_dir / "conversations" / "run"))

    @property
    def replies(self) -> list[dict[str, Any]]:
        return [reply for tree in self.trees for reply in tree["replies"]]

    @property
    def futures(self) -> list[dict[str, Any]]:
        return [future for reply in self.replies for future in reply["futures"]]

    def injected(self, role: str) -> Counter[str]:
        """By the field of RoleUsage that must count it."""
        fields: Counter[str] = Counter(unreadable=self.unreadable[role])
        for kind, count in self.counts[role].items():
            if kind != "good":
                fields["rejected" if kind == QUOTED else COUNTER_OF[kind]] += count
        return fields

    def counted(self, role: str, field: str) -> int:
        return int(self.figures[f"simulator/{role}/{field}"])


@pytest.fixture(scope="module")
def drilled(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Drilled:
    folder, log, terminal = tmp_path_factory.mktemp("drill"), io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(log)
    root = logging.getLogger()
    level = root.level
    with pytest.MonkeyPatch.context() as patch, endpoints() as (user, dead, judge):
        patch.setenv("DRILL_API_KEY", KEY)
        root.addHandler(handler)
        root.setLevel(logging.DEBUG)
        try:
            with redirect_stdout(terminal), redirect_stderr(terminal):
                answers, paid = asyncio.run(play(config_for(folder, tiny_model, user, dead, judge), user, dead, judge))
        finally:
            root.removeHandler(handler)
            root.setLevel(level)
        return Drilled(
            run_dir=folder / "run",
            answers=answers,
            counts={"user": user.counts + dead.counts, "judge": judge.counts},
            unreadable={"user": user.unreadable, "judge": judge.unreadable},
            paid=paid,
            said=log.getvalue() + terminal.getvalue(),
        )


def test_the_steps_finish(drilled: Drilled) -> None:
    assert [answer.error for answer in drilled.answers] == [""] * STEPS
    assert len(drilled.trees) == STEPS * PROMPTS
    statuses = Counter(future["status"] for future in drilled.futures)
    assert statuses.total() == STEPS * PROMPTS * REPLIES * FUTURES
    assert set(statuses) <= {"terminated", "max_turns", "truncated", "simulator_failed", "judge_failed"}
    for status, count in statuses.items():
        assert drilled.figures[f"rollout/futures_{status}"] == count
    for role in ROLES:
        assert set(ALL_FAULTS) <= set(drilled.counts[role]), "the seeds must bring every fault"
    assert drilled.counts["user"]["down"] > 0


def test_every_count_on_the_dashboard_is_what_was_injected(drilled: Drilled) -> None:
    for role in ROLES:
        injected = drilled.injected(role)
        counted = {field: drilled.counted(role, field) for field in injected}
        cancelled = drilled.counted(role, "cancelled")
        if cancelled == 0:
            assert counted == injected
        # of a cancelled request nobody knows what would have come of it, or whether it went out
        assert all(counted[field] <= injected[field] for field in injected), (role, counted, injected)
        assert sum(injected.values()) - sum(counted.values()) <= cancelled
        assert 0 <= drilled.counted(role, "attempts") - drilled.counts[role].total() <= cancelled
        ended = sum(counted[field] for field in FAILED_ATTEMPTS) + drilled.counted(role, "answers")
        assert ended + cancelled == drilled.counted(role, "attempts")
        assert drilled.counted(role, "malformed") == sum(counted[field] for field in MALFORMED)
        assert drilled.counted(role, "prompt_tokens") == 100 * drilled.counted(role, "answers")
        assert drilled.counted(role, "replayed") == drilled.counted(role, "in_flight") == 0
        assert drilled.paid[role] == drilled.counted(role, "answers")
    # only the other judge's failure cancels here
    assert drilled.counted("user", "cancelled") == 0
    assert drilled.counted("judge", "cancelled") <= drilled.counted("judge", "failures")
    statuses = Counter(future["status"] for future in drilled.futures)
    assert drilled.counted("user", "failures") == statuses["simulator_failed"]
    assert statuses["judge_failed"] <= drilled.counted("judge", "failures") <= 2 * statuses["judge_failed"]


def test_the_health_counters_are_what_was_injected(drilled: Drilled) -> None:
    for role in ROLES:
        health = {field: drilled.figures[f"health/{role}/{field}"] for field in ("replies", *MALFORMED)}
        assert health["replies"] == drilled.counted(role, "answers")
        assert {field: health[field] for field in MALFORMED} == {
            field: drilled.counted(role, field) for field in MALFORMED
        }
    injected = drilled.injected("user")
    assert {field: drilled.figures[f"health/user/{field}"] for field in MALFORMED} == {
        field: injected[field] for field in MALFORMED
    }
    turns = sum(message["role"] == "user" for future in drilled.futures for message in future["messages"])
    assert drilled.figures["health/user/turns"] == turns > 0
    said = [note for answer in drilled.answers for note in answer.notes]
    assert any("contain no readable JSON (unreadable: user " in note for note in said)


def test_what_failed_has_no_score_and_is_in_no_reward(drilled: Drilled) -> None:
    for future in drilled.futures:
        if future["status"].endswith("_failed"):
            assert (future["scores"], future["reward"]) == ({}, None)
            assert future["error"]
            continue
        assert set(future["scores"]) == set(WEIGHTS)
        assert 0.0 <= future["scores"]["interactivity"] <= 1.0
        assert future["scores"]["accuracy"] in (0.0, 1.0)
        shares = [max(-1.0, min(1.0, weight * future["scores"][name])) for name, weight in WEIGHTS.items()]
        assert future["reward"] == pytest.approx(sum(shares))
        assert future["error"] == ""
    for reply in drilled.replies:
        rewards = [future["reward"] for future in reply["futures"] if future["reward"] is not None]
        assert reply["mr"] == (pytest.approx(sum(rewards) / len(rewards)) if rewards else None)
    partly = [reply for reply in drilled.replies if None in [f["reward"] for f in reply["futures"]] and reply["mr"]]
    assert partly, "some reply must have lost one future and kept the other"
    rewards = [reply["mr"] for reply in drilled.replies if reply["mr"] is not None]
    assert drilled.figures["reward/mr_mean"] == pytest.approx(sum(rewards) / len(rewards))


def test_groups_with_fewer_than_two_scored_replies_are_dropped(drilled: Drilled) -> None:
    samples = 0
    for tree in drilled.trees:
        scored = [reply for reply in tree["replies"] if reply["mr"] is not None]
        assert tree["kept"] == (len(scored) >= 2)
        trained = [reply for reply in tree["replies"] if reply["advantage"] is not None]
        assert trained == (scored if tree["kept"] else [])
        samples += len(trained)
    dropped = [tree["task_id"] for tree in drilled.trees if not tree["kept"]]
    assert {MUTE_USER, MUTE_JUDGE} <= set(dropped)
    assert drilled.figures["rollout/groups_dropped"] == len(dropped)
    assert sum(len(answer.samples) for answer in drilled.answers) == samples > 0
    assert any(None in [r["mr"] for r in tree["replies"]] for tree in drilled.trees if tree["kept"])


def test_no_unusable_text_is_kept_as_anything_but_what_was_paid_for(drilled: Drilled) -> None:
    written = (drilled.run_dir / "conversations" / "run" / "shard0.jsonl").read_text()
    assert FAULTY not in written
    assert PROSE not in written
    with closing(sqlite3.connect(drilled.run_dir / "journal" / "run.sqlite")) as journal:
        rows = journal.execute("SELECT role, texts FROM replies").fetchall()
        delivered = b"".join(content for (content,) in journal.execute("SELECT content FROM deliveries"))
    assert FAULTY.encode() not in delivered
    assert PROSE.encode() not in delivered
    kept = Counter((role, text) for role, content in rows for text in unpack_texts(content) or ["none"])
    assert not [text for _, text in kept if FAULTY in text]
    for role in ROLES:
        assert sum(count for (of, _), count in kept.items() if of == role) == drilled.counted(role, "answers")
        assert kept[role, PROSE] == drilled.counted(role, "unreadable")
        assert kept[role, ""] == drilled.counted(role, "empty")
        assert kept[role, "none"] == drilled.counted(role, "wrong_role") + drilled.counted(role, "too_long")


def test_the_key_is_nowhere(drilled: Drilled) -> None:
    assert any("Bearer ***" in future["error"] for future in drilled.futures), "it must have been quoted"
    files = [path for path in drilled.run_dir.parent.rglob("*") if path.is_file()]
    assert {"shard0.jsonl", "run.sqlite"} <= {path.name for path in files}
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []
    assert KEY not in drilled.said
    assert KEY not in str(drilled.answers)
