"""Thousands of broken replies through the real driver: none ends it, none holds the event loop up."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import litellm
import pytest

from collab_megatron.config import RLConfig
from collab_megatron.config.sections import (
    DataSection,
    DriverSection,
    HealthSection,
    LLMSection,
    ModelSection,
    RolloutSection,
    RunSection,
    SimulatorsSection,
    UserSection,
)
from collab_megatron.data.chat import ChatTemplate
from collab_megatron.data.parquet import write_tasks
from collab_megatron.data_engine.grow import BuildPlayers, GrowthRules, grow_conversation
from collab_megatron.data_engine.output import append_conversation
from collab_megatron.data_engine.problems import Problem
from collab_megatron.engine.pool import EnginePool
from collab_megatron.figures import values
from collab_megatron.rollout.clients import open_clients, open_journal
from collab_megatron.rollout.llm import Gateway, SimulatorError, user_simulator
from collab_megatron.rollout.record_files import RecordWriter, read_trees
from collab_megatron.rollout.rewards import configured_scorer
from collab_megatron.rollout.service import Service
from collab_megatron.types import Generation, Message, Task
from collab_megatron.wire.protocol import Answer, Request, encode_answer
from tests.rollout.any_reply import ONCE_DEADLY, WELL, replies
from tests.rollout.runs import forget_deliveries

pytestmark = pytest.mark.slow

COUNT = 5200
SLOWEST_S = 0.050
"""Processor time of one reply, from the API's answer to the next thing that is waited for."""
NO_ENGINE = "http://127.0.0.1:9"  # it is live by name, and nobody asks it
NEW_TOKENS = 48


@dataclass
class Feed:
    """Stands for every LLM: the next of `texts` for those that are named in `to`, else a good one. Times what the
    driver does with each."""

    texts: list[str]
    to: tuple[str, ...]
    served: Counter[str] = field(default_factory=Counter)  # by model
    seconds: dict[str, float] = field(default_factory=dict)  # most processor time of a reply
    _now: str | None = None

    async def acompletion(self, *, model: str, **asked: Any) -> litellm.ModelResponse:
        await asyncio.sleep(0)  # what comes next is a step of the event loop of its own
        if self.texts and model.endswith(self.to):
            self._now = self.texts.pop()
            self.served[model] += 1
        text = WELL if self._now is None else self._now
        choices = [
            {"index": i, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            for i in range(asked.get("n", 1))
        ]
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        return litellm.ModelResponse(choices=choices, model=f"{model}-\ud800", usage=usage)

    def took(self, seconds: float) -> None:
        """The step of the event loop in which the newest reply came is over."""
        if self._now is not None:
            self.seconds[self._now] = max(seconds, self.seconds.get(self._now, 0.0))
            self._now = None


@contextmanager
def fed(texts: Sequence[str], *to: str) -> Iterator[Feed]:
    """Every call of LiteLLM is answered by a Feed, every policy turn is made of any ids."""
    feed, rng = Feed(list(texts), to), random.Random(3)
    run = asyncio.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        begin = time.thread_time()
        run(handle)
        feed.took(time.thread_time() - begin)

    async def generate(self: EnginePool, input_ids: Sequence[int], *, n: int, **asked: Any) -> list[Generation]:
        await asyncio.sleep(0)
        return [_turn(rng, self._live[0].version or 0) for _ in range(n)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(litellm, "acompletion", feed.acompletion)
        patch.setattr(asyncio.Handle, "_run", timed)
        patch.setattr(EnginePool, "generate", generate)
        yield feed


def _turn(rng: random.Random, version: int) -> Generation:
    """Any ids, special ones and ones beyond the vocabulary too."""
    ids = tuple(rng.randrange(600) if rng.random() < 0.98 else 100_000 for _ in range(rng.randint(0, NEW_TOKENS)))
    return Generation(ids, (-1.0,) * len(ids), (version,) * len(ids), "stop")


def config_for(folder: Path, model: Path) -> RLConfig:
    write_tasks(
        folder / "train.parquet",
        [Task(f"task-{i}", (Message("user", "a table\u2028please"),), f"a table for {i}", "BOOK") for i in range(16)],
    )
    way: dict[str, Any] = {"api_base": "http://127.0.0.1:9/v1", "api_key_env": None, "max_attempts": 2}
    return RLConfig(
        run=RunSection(dir=folder / "run"),
        model=ModelSection(path=str(model)),
        data=DataSection(train=folder / "train.parquet"),
        simulators=SimulatorsSection(
            user=UserSection(model="hosted_vllm/user", **way),
            judge=LLMSection(model="hosted_vllm/judge", **way),
            assistant=LLMSection(model="hosted_vllm/assistant", **way),
            health=HealthSection(min_replies=1),
        ),
        rollout=RolloutSection(
            prompts_per_step=16, num_replies=4, num_repeat_rollouts=2, max_new_tokens=NEW_TOKENS, cut_reply="play"
        ),
        driver=DriverSection(max_unexpected_errors=0),
    )


async def steps(config: RLConfig, feed: Feed, most: int) -> list[Answer]:
    """Steps of the run from its first until every text was said, at least one and at most `most`."""
    answers: list[Answer] = []
    with closing(open_journal(config)) as journal:
        async with open_clients(config, engine_urls=(), max_context_tokens=4096, journal=journal) as clients:
            recorder = RecordWriter(config.run.conversations_dir, config.record, first_step=1)
            service = Service(config, clients, recorder)
            while len(answers) < most and (feed.texts or not answers):
                step = len(answers)
                while (answer := await service.answer(Request("step", step, step, (NO_ENGINE,)))).pending:
                    pass
                encode_answer(answer)
                answers.append(answer)
            await service.close()
    return answers


async def built(config: RLConfig, feed: Feed, most: int, shard: Path) -> int:
    """Conversations of the data builder until every text was said, at most `most`; how many came to an end, their rows
    written."""
    simulators = config.simulators
    assert simulators.assistant is not None
    assert simulators.judge is not None
    gateway = Gateway({"user": simulators.user, "judge": simulators.judge, "assistant": simulators.assistant}, 1)
    builders = BuildPlayers(
        gateway.role("assistant"),
        user_simulator(simulators, gateway),
        configured_scorer(config.reward, simulators, gateway),
        lambda text: len(text.split()),
    )
    rules = GrowthRules(num_candidates=2, num_futures=1, max_total_turns=2, max_user_turns=1)
    ended = index = 0
    while feed.texts and index < most:
        index += 1
        problem = Problem(index, Task(f"p{index}", (Message("user", "hi"),), "a table", "BOOK"))
        try:
            rows = await grow_conversation(problem, rules, builders)
        except SimulatorError:
            continue
        append_conversation(shard, rows)
        ended += 1
    await gateway.close()
    return ended


def test_no_reply_ends_the_driver_or_holds_it_up(
    tmp_path: Path, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [*replies(COUNT), *ONCE_DEADLY]  # the last are said first, to the user; among the others to anybody
    config = config_for(tmp_path, tiny_model)
    with fed(texts, "user", "judge") as feed:
        answers = asyncio.run(steps(config, feed, most=60))
    assert not feed.texts, "the steps ended before every reply was said"
    assert {answer.error for answer in answers} == {""}
    assert sum(feed.served.values()) == len(texts)
    assert min(feed.served[f"hosted_vllm/{role}"] for role in ("user", "judge")) > COUNT // 5
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    lines = (config.run.conversations_dir / "shard0.jsonl").read_text()
    assert len(lines.splitlines()) == len(lines.split("\n")) - 1, "one line a row, to every reader"
    statuses = Counter(
        f["status"] for t in read_trees(config.run.conversations_dir) for r in t["replies"] for f in r["futures"]
    )
    assert set(statuses) <= {
        "terminated",
        "max_turns",
        "truncated",
        "simulator_failed",
        "judge_failed",
        "engine_failed",
    }
    assert statuses["simulator_failed"] > 0
    assert statuses["max_turns"] + statuses["terminated"] > 0

    forget_deliveries(config)  # a resume that makes the first batch again, of what the journal holds
    with fed([]) as again:
        (answer,) = asyncio.run(steps(config, again, most=1))
    assert answer.error == ""
    figures = values(answer.figures)
    assert figures["simulator/user/replayed"] > figures["simulator/user/malformed"] > len(ONCE_DEADLY) // 2
    assert figures["simulator/user/unreadable"] == figures["health/user/unreadable"] > 0

    slow = sorted(text for text, seconds in feed.seconds.items() if seconds > SLOWEST_S)
    for number, text in enumerate(slow):  # a collection of garbage, or a busy machine, or slow indeed
        seconds = []
        for attempt in range(3):
            folder = tmp_path / f"again-{number}-{attempt}"
            with fed([text] * 4, "user") as feed:
                asyncio.run(steps(config_for(folder, tiny_model), feed, most=1))
            seconds.append(feed.seconds[text])
        assert min(seconds) <= SLOWEST_S, f"{text[:40]!r} of {len(text):,} characters takes {min(seconds):.3f} s"


def test_no_reply_ends_the_builder_of_data(tmp_path: Path, tiny_model: Path) -> None:
    """The assistant's role: a reply goes into the rows as it comes, without JSON around it."""
    texts = replies(1000, seed=2)
    config = config_for(tmp_path, tiny_model)
    file = tmp_path / "rows.jsonl"
    with fed(texts, "assistant") as feed:
        ended = asyncio.run(built(config, feed, 1000, file))
    assert not feed.texts, "the conversations ended before every reply was said"
    assert ended > 100
    for line in file.read_text().splitlines():
        assert json.loads(line)["completion"]


async def test_an_unforeseen_exception_costs_its_future_and_too_many_stop_the_run(
    tmp_path: Path, tiny_model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the real driver: the chat template breaks at three user turns of a step, then at four."""
    config = config_for(tmp_path, tiny_model)
    config = config.model_copy(update={"driver": DriverSection(max_unexpected_errors=3)})
    left = 0

    def grow(self: ChatTemplate, *chat: Any) -> list[int]:
        nonlocal left
        if left:
            left -= 1
            raise ZeroDivisionError("half \ud800 of a turn")
        return kept(self, *chat)

    kept = ChatTemplate.grow
    monkeypatch.setattr(ChatTemplate, "grow", grow)
    answers: list[Answer] = []
    with fed([]), closing(open_journal(config)) as journal:
        async with open_clients(config, engine_urls=(), max_context_tokens=4096, journal=journal) as clients:
            service = Service(config, clients, RecordWriter(config.run.conversations_dir, config.record, first_step=1))
            for step, breaks in enumerate((3, 3, 4)):  # counted for each step
                left = breaks
                while (answer := await service.answer(Request("step", step, step, (NO_ENGINE,)))).pending:
                    pass
                answers.append(answer)
            await service.close()
    for answer in answers[:2]:
        assert answer.error == ""
        assert values(answer.figures)["rollout/futures_unexpected_error"] == 3
    stop = answers[2]
    assert (stop.stop, stop.samples) == ("errors", ())
    assert "driver.max_unexpected_errors=3" in stop.error
    assert "ZeroDivisionError: half \ufffd of a turn" in stop.error
    encode_answer(stop)
    logged = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(logged) == 10
    assert all(record.exc_info is not None for record in logged), "each with its traceback"
    futures = [f for t in read_trees(config.run.conversations_dir) for r in t["replies"] for f in r["futures"]]
    broken = [future for future in futures if future["status"] == "unexpected_error"]
    assert len(broken) == 6
    assert {(future["reward"], future["error"]) for future in broken} == {
        (None, "ZeroDivisionError: half \ufffd of a turn")
    }
