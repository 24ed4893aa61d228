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
from dataclasses import dataclass, field, replace
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
from collab_megatron.data.build.grow import Growth, grow_conversation
from collab_megatron.data.build.grow import Players as Builders
from collab_megatron.data.build.problems import Problem
from collab_megatron.data.build.shards import append_conversation
from collab_megatron.data.parquet import write_tasks
from collab_megatron.driver.cast import Cast, assemble, open_journal
from collab_megatron.driver.protocol import Answer, Request, encode_answer
from collab_megatron.driver.recorder import TreeRecorder, read_trees
from collab_megatron.driver.service import Service
from collab_megatron.engine.pool import EnginePool
from collab_megatron.rewards import configured_scorer
from collab_megatron.simulators import Gateway, SimulatorError, user_simulator
from collab_megatron.types import Generation, Message, Task
from tests.driver.any_reply import GOOD, ONCE_DEADLY, replies

COUNT = 5200
SLOWEST_S = 0.050
"""Processor time of one reply, from the API's answer to the next thing that is waited for."""
NO_ENGINE = "http://127.0.0.1:9"  # it is live by name, and nobody asks it
NEW_TOKENS = 48


@dataclass
class Feed:
    """Stands for every LLM: the next of `texts`, then good ones. Times what the driver does with each."""

    texts: list[str]
    served: Counter[str] = field(default_factory=Counter)  # by model
    seconds: dict[str, float] = field(default_factory=dict)  # most processor time of a reply
    _now: str | None = None

    async def acompletion(self, *, model: str, **asked: Any) -> litellm.ModelResponse:
        await asyncio.sleep(0)  # what comes next is a step of the event loop of its own
        if self.texts:
            self._now = self.texts.pop()
            self.served[model] += 1
        text = self._now or GOOD[0]
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
def fed(texts: Sequence[str]) -> Iterator[Feed]:
    """Every call of LiteLLM is answered from `texts`, every policy turn is made of pieces of them."""
    feed, rng = Feed(list(texts)), random.Random(3)
    run = asyncio.Handle._run  # type: ignore[attr-defined]

    def timed(handle: asyncio.Handle) -> None:
        begin = time.thread_time()
        run(handle)
        feed.took(time.thread_time() - begin)

    async def generate(self: EnginePool, input_ids: Sequence[int], *, n: int, **asked: Any) -> list[Generation]:
        await asyncio.sleep(0)
        return [_turn(rng) for _ in range(n)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(litellm, "acompletion", feed.acompletion)
        patch.setattr(asyncio.Handle, "_run", timed)
        patch.setattr(EnginePool, "generate", generate)
        yield feed


def _turn(rng: random.Random) -> Generation:
    """Any ids, special ones and ones beyond the vocabulary too."""
    ids = tuple(rng.randrange(600) if rng.random() < 0.98 else 100_000 for _ in range(rng.randint(0, NEW_TOKENS)))
    return Generation(ids, (-1.0,) * len(ids), (0,) * len(ids), "stop")


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
    """Steps of the run until every text was said, at most `most`."""
    answers: list[Answer] = []
    with closing(open_journal(config)) as journal:
        async with assemble(config, engine_urls=(), max_context_tokens=4096, journal=journal) as cast:
            cast = replace(cast, players=replace(cast.players))
            recorder = TreeRecorder(config.run.conversations_dir, config.record, first_step=1)
            service = Service(config, cast, recorder)
            while feed.texts and len(answers) < most:
                step = len(answers)
                while (answer := await service.answer(Request("step", step, 0, (NO_ENGINE,)))).pending:
                    pass
                encode_answer(answer)
                answers.append(answer)
            await service.close()
    return answers


async def built(config: RLConfig, count: int, shard: int) -> int:
    """Conversations of the data builder, of `count` that were begun, that came to an end; their rows are written."""
    simulators = config.simulators
    assert simulators.assistant is not None
    assert simulators.judge is not None
    gateway = Gateway({"user": simulators.user, "judge": simulators.judge, "assistant": simulators.assistant}, 1)
    builders = Builders(
        gateway.role("assistant"),
        user_simulator(simulators, gateway),
        configured_scorer(config.reward, simulators, gateway),
        lambda text: len(text.split()),
    )
    growth = Growth(num_candidates=2, num_futures=2, max_total_turns=2, max_user_turns=1)
    ended = 0
    for index in range(count):
        problem = Problem(index, Task(f"p{index}", (Message("user", "hi"),), "a table", "BOOK"))
        try:
            rows = await grow_conversation(problem, growth, builders)
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
    with fed(texts) as feed:
        answers = asyncio.run(steps(config, feed, most=60))
    assert not feed.texts, "the steps ended before every reply was said"
    assert {answer.error for answer in answers} == {""}
    assert sum(feed.served.values()) == len(texts)
    assert min(feed.served[f"hosted_vllm/{role}"] for role in ("user", "judge")) > COUNT // 5
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    lines = (config.run.conversations_dir / "shard0.jsonl").read_text()
    assert len(lines.splitlines()) == len(lines.split("\n")) - 1, "one line a row, to every reader"
    statuses = Counter(f["status"] for t in read_trees(config.run.conversations_dir) for r in t["replies"] for f in r["futures"])
    assert set(statuses) <= {"terminated", "max_turns", "truncated", "simulator_failed", "judge_failed", "engine_failed"}
    assert statuses["simulator_failed"] > 0
    assert statuses["max_turns"] + statuses["terminated"] > 0

    slow = sorted(text for text, seconds in feed.seconds.items() if seconds > SLOWEST_S)
    for number, text in enumerate(slow):  # a collection of garbage, or a busy machine, or slow indeed
        again = []
        for attempt in range(3):
            folder = tmp_path / f"again-{number}-{attempt}"
            with fed([text] * 4) as feed:
                asyncio.run(steps(config_for(folder, tiny_model), feed, most=1))
            again.append(feed.seconds[text])
        assert min(again) <= SLOWEST_S, f"{text[:40]!r} of {len(text):,} characters takes {min(again):.3f} s"
