"""The driver's service over the real pool: engines come with every request, a step without engines is played again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import pytest
from aiohttp import web

from collab_megatron.config import RLConfig
from collab_megatron.config.sections import (
    AlgorithmSection,
    BudgetSection,
    DataSection,
    DriverSection,
    HealthSection,
    ModelSection,
    RewardSection,
    RolloutSection,
    RunSection,
    SimulatorsSection,
    UserSection,
)
from collab_megatron.config.sections.rollout import EqualReplies
from collab_megatron.data.parquet import write_tasks
from collab_megatron.engine.pool import EnginePool
from collab_megatron.figures import values
from collab_megatron.limiter import AdaptiveLimiter
from collab_megatron.rollout.clients import RolloutClients, open_journal
from collab_megatron.rollout.journaled_engine import JournaledEngine
from collab_megatron.rollout.llm import Gateway, SimulatorHealth
from collab_megatron.rollout.llm.accounting import GatewaySnapshot
from collab_megatron.rollout.llm.budget import Budget
from collab_megatron.rollout.record_files import RecordWriter
from collab_megatron.rollout.service import Service
from collab_megatron.types import Message, Task
from collab_megatron.wire.protocol import Answer, Request, Tally
from tests.engine.fake_servers import FakeServer, servers, slowly
from tests.rollout.fakes import LIMITS, TASK, ScriptedUser, players

RECORD = Path("conversations", "run", "shard0.jsonl")


class NoGateway:
    def __init__(self) -> None:
        self.budget = Budget(BudgetSection(), None, dict)

    def snapshot(self) -> GatewaySnapshot:
        return GatewaySnapshot()


@asynccontextmanager
async def service(
    folder: Path,
    *fakes: FakeServer,
    first_step: int | None = 1,
    tasks: Sequence[Task] = (TASK,),
    zero_advantage: Literal["keep", "drop"] = "keep",
    credit: Literal["reply", "tree"] = "reply",
    equal_replies: EqualReplies = "apart",
    **driver: Any,
) -> AsyncIterator[Service]:
    """Two prompts a step, two replies, one future each: four conversations of three policy turns."""

    def go_on(chat: Sequence[Message], sample_index: int) -> str:
        return "go on"

    write_tasks(folder / "train.parquet", tasks)
    model = folder / "model"  # the lineage looks at its files, nobody else
    model.mkdir(exist_ok=True)
    config = RLConfig(
        run=RunSection(dir=folder),
        model=ModelSection(path=str(model)),
        data=DataSection(train=folder / "train.parquet", validation=folder / "train.parquet"),
        simulators=SimulatorsSection(user=UserSection(model="none")),
        reward=RewardSection(metric_weights={"accuracy": 1.0}, accuracy_verifier="exact"),
        rollout=RolloutSection(
            prompts_per_step=2, num_replies=2, num_repeat_rollouts=1, max_new_tokens=4, equal_replies=equal_replies
        ),
        algorithm=AlgorithmSection(zero_advantage=zero_advantage, credit=credit),
        driver=DriverSection(**driver),
    )
    async with (
        servers(*fakes),
        EnginePool(
            stop_token_ids=[9],
            request_timeout_s=30,
            health_timeout_s=30,
            max_concurrency=8,
            wait_for_engines=True,
            updates_while_sampling=config.driver.max_staleness > 0,
        ) as engine,
    ):
        slots = AdaptiveLimiter(1000)
        with contextlib.closing(open_journal(config)) as journal:
            journaled = JournaledEngine(engine, journal, slots, max_staleness=config.driver.max_staleness)
            everybody = players(cast(Any, journaled), ScriptedUser(go_on))
            recorder = RecordWriter(config.run.conversations_dir, config.record, first_step=first_step)
            health, gateway = SimulatorHealth(HealthSection()), cast(Gateway, NoGateway())
            keeps = credit == "tree"
            limits = replace(
                LIMITS, cut_reply="play", keep_contexts=keeps
            )  # the servers' replies do not end with the chat's END
            everything = RolloutClients(everybody, limits, engine, slots, journaled, gateway, health, journal)
            service = Service(config, everything, recorder)
            yield service
            await service.close()


async def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


async def answered(driver: Service, request: Request) -> Answer:
    """Ask as the trainer does, until it is done."""
    end = time.monotonic() + 30
    while (answer := await driver.answer(request)).pending:
        assert time.monotonic() < end
    return answer


@pytest.mark.slow
async def test_a_step_without_engines_is_asked_for_again_with_others(tmp_path: Path) -> None:
    dying, fresh = FakeServer(version="0", answer=slowly(1)), FakeServer(version="0")
    async with service(tmp_path, dying, fresh) as driver:
        first = asyncio.create_task(answered(driver, Request("step", 0, 0, (dying.url,))))
        await asyncio.sleep(0.5)
        await dying.die()
        failed = await asyncio.wait_for(first, timeout=10)
        assert failed.no_engine
        assert list(failed.lost) == [dying.url]
        assert not failed.samples
        assert not (tmp_path / RECORD).exists()  # nothing of it counts
        again = await answered(driver, Request("step", 0, 0, (fresh.url,)))
        assert again.samples
        assert len(again.samples) == 4
        assert again.lost == {}
        assert values(again.figures)["engine/live"] == 1
        assert values(again.figures)["rollout/futures_engine_failed"] == 0
        # two prompts, two replies each: two requests for the replies, and two more turns in four futures
        assert len(fresh.bodies) == 2 + 4 * 2


async def test_a_server_that_is_lost_on_the_way_comes_with_the_batch(tmp_path: Path) -> None:
    for attempt in range(20):  # where the prompt lives depends on the ports
        wrong, right = FakeServer(version="default"), FakeServer(version="0")
        folder = tmp_path / str(attempt)
        folder.mkdir()
        async with service(folder, wrong, right) as driver:
            answer = await answered(driver, Request("step", 0, 0, (wrong.url, right.url)))
        assert {v for sample in answer.samples for v in sample.versions_T} == {0}
        if wrong.bodies:
            break
    assert list(answer.lost) == [wrong.url]
    assert values(answer.figures)["engine/lost"] == 1


@pytest.mark.slow
async def test_a_step_ends_the_evaluation_that_is_asked_for_no_longer(tmp_path: Path) -> None:
    server = FakeServer(version="0", answer=slowly(0.5))
    async with service(tmp_path, server) as driver:
        assert (await driver.answer(Request("evaluate", 0, 0, (server.url,)))).error == ""
        answer = await answered(driver, Request("step", 0, 0, (server.url,)))
        assert len(answer.samples) == 4
        assert not [task for task in asyncio.all_tasks() if "evaluate" in repr(task.get_coro())]


async def test_prompts_that_are_too_long_are_counted_on_the_dashboard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = FakeServer(version="0")
    long = [replace(TASK, task_id=f"long{i}", prompt=(Message("user", "x" * (97 + i)),)) for i in range(2)]
    tasks = [TASK, *long, replace(TASK, task_id="t2")]  # a character is a token, 100 - 4 leave room for a reply
    async with service(tmp_path, server, tasks=tasks) as driver:
        figures = values((await answered(driver, Request("step", 0, 0, (server.url,)))).figures)
    assert (figures["data/prompts_left_out"], figures["data/prompts_left_out_share"]) == (2, 0.5)
    assert "left out: 2 of 4 prompts (50.0%) have more than 96 tokens; the longest, task long1, has 98" in (
        capsys.readouterr().out
    )


async def test_the_status_follows_the_requests(tmp_path: Path) -> None:
    server = FakeServer(version="0", answer=slowly(0.05))
    async with service(tmp_path, server, first_step=None) as driver:
        before = driver.status()
        assert (before.phase, before.step, before.trees_running, before.chat) == ("waiting for the trainer", 0, 0, ())
        asking = asyncio.create_task(driver.answer(Request("step", 0, 0, (server.url,))))
        await asyncio.sleep(0.1)
        during = driver.status()
        assert (during.phase, during.step, during.engines_live) == ("rollouts of step 1", 1, 1)
        assert during.trees_running > 0
        await asking
        await answered(driver, Request("step", 0, 0, (server.url,)))
        server.version = "1"
        await answered(driver, Request("step", 1, 1, (server.url,)))
        after = driver.status()
    assert (after.phase, after.step) == ("waiting for the trainer", 2)
    assert [role for role, _ in after.chat][:2] == ["user", "assistant"]
    assert after.figures["rollout/samples"] == 4
    assert after.eta_s is not None
    assert after.seconds_per_step is not None
    assert after.eta_s == after.seconds_per_step * (100 - 2)


async def test_an_evaluation_leaves_its_conversations(tmp_path: Path) -> None:
    server = FakeServer(version="0")
    async with service(tmp_path, server) as driver:
        answer = await answered(driver, Request("evaluate", 3, 0, (server.url,)))
    assert values(answer.figures)["conversations"] == 1
    (line,) = (tmp_path / "evaluations" / "run" / "step_00000003.jsonl").read_text().splitlines()
    played = json.loads(line)
    assert (played["step"], played["task_id"]) == (3, TASK.task_id)
    assert played["replies"][0]["futures"][0]["scores"] == {"accuracy": 6.0}


@pytest.mark.parametrize("staleness, apart", [(0, True), (1, False)])
@pytest.mark.slow
async def test_an_evaluation_is_not_counted_in_the_next_step(tmp_path: Path, staleness: int, apart: bool) -> None:
    """It has three policy turns of 0.3 s each. With trees in flight nothing tells its share apart."""
    server = FakeServer(version="0", answer=slowly(0.3))
    async with service(tmp_path, server, first_step=None, max_staleness=staleness) as driver:
        await answered(driver, Request("evaluate", 0, 0, (server.url,)))
        server.answer = None
        figures = values((await answered(driver, Request("step", 0, 0, (server.url,)))).figures)
    assert (figures["time_s/engine"] < 0.5) == apart


async def test_a_batch_is_the_same_however_often_it_is_asked_for_and_by_whom(tmp_path: Path) -> None:
    """A driver that was killed and started again reads it from the journal; nothing is sampled twice."""
    server = FakeServer(version="0")
    async with service(tmp_path, server) as driver:
        first = await answered(driver, Request("step", 0, 0, (server.url,)))
        asked = len(server.bodies)
        assert await answered(driver, Request("step", 0, 0, (server.url,))) == first
        lines = (tmp_path / RECORD).read_text()
        assert len(lines.splitlines()) == 2
    await server.start()
    async with service(tmp_path, server, first_step=None) as driver:
        again = await answered(driver, Request("step", 0, 0, (server.url,)))
        assert (again.samples, again.figures, again.shown) == (first.samples, first.figures, first.shown)
        assert [tree.text.partition(":")[0] for tree in first.shown] == ["task t1"] * 2  # the best and the worst
        # what counts from the start of a process is on the dashboard by step alone; totals are the journal's (budget/)
        assert not [name for name in again.figures if name.startswith("total/")]
        assert len(server.bodies) == asked
        assert (tmp_path / RECORD).read_text() == lines
        server.version = "1"
        second = await answered(driver, Request("step", 1, 1, (server.url,)))
        assert {v for sample in second.samples for v in sample.versions_T} == {1}
        assert len(server.bodies) == 2 * asked


async def test_a_refused_batch_is_made_again(tmp_path: Path) -> None:
    """The trainer refused it, since over half of all shards' groups were dropped: an attempt to resume gets another."""

    async def refuse(body: dict[str, Any]) -> web.Response:
        return web.json_response({"error": {"message": "too long"}}, status=400)

    broken, server = FakeServer(version="0", answer=refuse), FakeServer(version="0")
    async with service(tmp_path, broken, server) as driver:
        first = await answered(driver, Request("step", 0, 0, (broken.url,)))
        assert first.tally.lost == 2
        assert await answered(driver, Request("step", 0, 0, (broken.url,))) == first
        await driver.answer(Request("discard", 0))
        again = await answered(driver, Request("step", 0, 0, (server.url,)))
        assert again.tally == Tally(2, 0)
        assert len(again.samples) == 4


async def test_groups_that_were_replaced_are_not_trained(tmp_path: Path) -> None:
    """All replies are the same here: no group has spread, and two more are grown in place of the first two."""
    server = FakeServer(version="0")
    async with service(tmp_path, server, refill_groups=2) as driver:
        answer = await answered(driver, Request("step", 0, 0, (server.url,)))
    assert values(answer.figures)["rollout/groups_replaced"] == 2
    assert answer.tally == Tally(4, 0)
    assert len(answer.samples) == values(answer.figures)["rollout/samples"] == 2 * 2
    assert len((tmp_path / RECORD).read_text().splitlines()) == 4  # the record keeps them


async def test_groups_without_spread_can_be_left_out(tmp_path: Path) -> None:
    server = FakeServer(version="0")
    async with service(tmp_path, server, zero_advantage="drop") as driver:
        answer = await answered(driver, Request("step", 0, 0, (server.url,)))
    assert (answer.samples, answer.error) == ((), "")
    assert values(answer.figures)["rollout/samples"] == 0


async def test_equal_replies_are_played_once_and_every_turn_of_theirs_is_trained(tmp_path: Path) -> None:
    server = FakeServer(version="0")
    async with service(tmp_path, server, equal_replies="once", credit="tree") as driver:
        asked = Request("step", 0, 0, (server.url,))
        answer = await answered(driver, asked)
        assert await answered(driver, asked) == answer
    assert len(server.bodies) == 2 * (1 + 2)  # of each tree the replies, and two later turns of one conversation
    figures = values(answer.figures)
    assert len(answer.samples) == figures["rollout/samples"] == 2 * (2 + 2 * 2)
    assert figures["rollout/trained_tokens"] == sum(len(sample.reply_ids_T) for sample in answer.samples)
    assert (figures["rollout/futures_played"], figures["rollout/groups_uniform"]) == (2, 2)
    contexts = sorted({len(sample.prompt_ids) for sample in answer.samples})
    assert contexts == sorted({len(body["input_ids"]) for body in server.bodies})  # as the engine has seen them
    async with service(tmp_path, again := FakeServer(version="0"), equal_replies="once", credit="tree") as driver:
        resumed = await answered(driver, Request("step", 0, 0, (again.url,)))
    assert (resumed.samples, again.bodies) == (answer.samples, [])  # from the journal


async def test_with_staleness_the_next_batch_grows_beside_the_training(tmp_path: Path) -> None:
    server = FakeServer(version="0")
    async with service(tmp_path, server, max_staleness=1, order="prompt") as driver:
        await answered(driver, Request("step", 0, 0, (server.url,)))
        await until(lambda: len(server.bodies) == 2 * (2 + 4 * 2))  # two batches
        server.version = "1"  # an update, of which the driver does not hear before the next request
        second = await answered(driver, Request("step", 1, 1, (server.url,)))
        assert {v for sample in second.samples for v in sample.versions_T} == {0}
        assert values(second.figures)["rollout/staleness_max"] == 1
        await until(lambda: len(server.bodies) == 3 * (2 + 4 * 2))
        server.version = "2"
        third = await answered(driver, Request("step", 2, 2, (server.url,)))
        assert {v for sample in third.samples for v in sample.versions_T} == {1}


async def test_a_server_that_a_tree_needs_comes_back_and_the_tree_goes_on(tmp_path: Path) -> None:
    dying, fresh = FakeServer(version="0", answer=slowly(0.2)), FakeServer(version="0")
    async with service(tmp_path, dying, fresh) as driver:
        asked = Request("step", 0, 0, (dying.url,))
        waiting = asyncio.create_task(answered(driver, asked))
        await until(lambda: dying.answered >= 3)
        await dying.die()
        assert (await waiting).no_engine
        done = await answered(driver, Request("step", 0, 0, (fresh.url,)))
        assert len(done.samples) == 4
        assert len(fresh.bodies) <= 10 - 3  # what the first had answered is not asked for again


async def test_a_spent_budget_ends_what_is_under_way_and_begins_nothing(tmp_path: Path) -> None:
    server = FakeServer(version="0")
    async with service(tmp_path, server) as driver:
        driver._clients.gateway.budget._own = lambda: {("user", "none"): (4, 1.5)}  # as many as a tree takes
        driver._clients.gateway.budget._section = BudgetSection(hard_usd=1.0)
        stopped = await answered(driver, Request("step", 0, 0, (server.url,)))
        assert stopped.stop == "budget"
        assert "raise budget.hard_usd" in stopped.error
        assert server.bodies == []
        driver._clients.gateway.budget._section = BudgetSection(hard_usd=4.0)
        asked = asyncio.create_task(driver.answer(Request("step", 0, 0, (server.url,))))
        await until(lambda: server.bodies)
        driver._clients.gateway.budget._section = BudgetSection(hard_usd=1.0)
        await asked
        assert len((await answered(driver, Request("step", 0, 0, (server.url,)))).samples) == 4  # it was under way
        assert (await answered(driver, Request("step", 1, 1, (server.url,)))).stop == "budget"
