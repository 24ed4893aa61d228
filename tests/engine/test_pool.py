"""The pool: which server is asked, which is lost, and that no caller notices. Fake servers; SGLang: test_lost.py."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from collab_megatron.engine.client import EngineClient, EngineSilent
from collab_megatron.engine.pool import FULLER_SEQUENCES, EnginePool
from collab_megatron.errors import NoEngineLeft, RunError
from collab_megatron.figures import values
from collab_megatron.types import Generation
from tests.engine.fake_servers import FakeServer, reply, servers, slowly


@asynccontextmanager
async def pool(
    *fakes: FakeServer,
    health_timeout_s: float = 30,
    request_timeout_s: float = 30,
    work_timeout_s: float = 60,
    updates_while_sampling: bool = False,
) -> AsyncIterator[Any]:
    """A pool that uses all of `fakes` at version 1."""
    async with (
        servers(*fakes),
        EnginePool(
            stop_token_ids=[2],
            request_timeout_s=request_timeout_s,
            health_timeout_s=health_timeout_s,
            work_timeout_s=work_timeout_s,
            max_concurrency=64,
            updates_while_sampling=updates_while_sampling,
        ) as engines,
    ):
        engines.use([fake.url for fake in fakes], 1)
        yield engines


async def ask(engines: EnginePool, key: str = "", n: int = 1) -> list[Generation]:
    return await engines.generate([1, 2], n=n, temperature=1.0, max_new_tokens=4, affinity=key)


async def ask_many(engines: EnginePool, count: int) -> None:
    """All are answered, whichever server is lost on the way."""
    asked = (ask(engines, f"task {i}") for i in range(count))
    for answer in await asyncio.wait_for(asyncio.gather(*asked), timeout=30):
        assert answer[0].token_ids_T == (5, 2)


async def until(condition: Any) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


async def test_one_prompt_stays_at_one_server_and_prompts_spread() -> None:
    a, b, c = fakes = FakeServer(), FakeServer(), FakeServer()
    async with pool(*fakes) as engines:
        for i in range(60):
            before = [fake.answered for fake in fakes]
            for _ in range(3):
                await ask(engines, f"task {i}")
            assert sorted(now.answered - then for now, then in zip(fakes, before, strict=True)) == [0, 0, 3]
        assert min(fake.answered for fake in fakes) >= 9  # of 180
        assert engines.usage.requests == 180
        assert engines.usage.generated_by == {fake.url: 2 * fake.answered for fake in fakes}
        homes = {i: await home(engines, fakes, i) for i in range(30)}
        engines.use([a.url, b.url], 1)
        moved = {i for i, fake in homes.items() if await home(engines, fakes, i) is not fake}
        assert moved == {i for i, fake in homes.items() if fake is c}  # the server's that went, and no others


async def home(engines: EnginePool, fakes: tuple[FakeServer, ...], task: int) -> FakeServer:
    before = [fake.answered for fake in fakes]
    await ask(engines, f"task {task}")
    return next(fake for fake, then in zip(fakes, before, strict=True) if fake.answered > then)


async def test_a_server_that_is_far_fuller_is_passed_by() -> None:
    fakes = FakeServer(answer=slowly(0.5)), FakeServer(answer=slowly(0.5))
    async with pool(*fakes) as engines:
        await asyncio.gather(*(ask(engines, "one prompt", n=4) for _ in range(20)))
        few, many = sorted(4 * len(fake.bodies) for fake in fakes)
        assert few > 0
        assert many <= 1.25 * few + FULLER_SEQUENCES + 4


async def test_every_request_names_the_weights_under_which_prefixes_may_be_shared() -> None:
    fake = FakeServer()
    async with pool(fake) as engines:
        await ask(engines)
        engines.use([fake.url], None)
        await ask(engines)
        fake.version = "7"
        engines.use([fake.url], 7)
        assert (await ask(engines))[0].versions_T == (7, 7)
        assert [body.get("extra_key") for body in fake.bodies] == ["1", None, "7"]


@pytest.mark.slow
async def test_a_server_that_dies_loses_nothing() -> None:
    fakes = FakeServer(answer=slowly(0.3)), FakeServer(answer=slowly(0.3))
    async with pool(*fakes) as engines:
        asked = asyncio.create_task(ask_many(engines, 40))
        await until(lambda: len(fakes[0].bodies) > 4)
        await fakes[0].die()
        await asked
        assert list(engines.lost) == [fakes[0].url]
        assert "gone during generate" in engines.lost[fakes[0].url]
        assert engines.live == (fakes[1].url,)
        assert engines.usage.requests == 40
        assert engines.usage.retried > 4
        assert engines.usage.prompt_tokens == 80  # what was given up counts nowhere
        seen = len(fakes[0].bodies)
        await fakes[0].start(int(fakes[0].url.rpartition(":")[2]))  # there again, but nobody has synced it
        await ask_many(engines, 20)
        assert len(fakes[0].bodies) == seen
        engines.use([fake.url for fake in fakes], 1)
        await ask_many(engines, 20)
        assert len(fakes[0].bodies) > seen
        assert engines.lost == {}


@pytest.mark.slow
async def test_a_server_that_hangs_is_given_up_at_its_health_deadline() -> None:
    fakes = FakeServer(), FakeServer()
    async with pool(*fakes, health_timeout_s=1) as engines:
        fakes[0].silent = True
        start = time.monotonic()
        await ask_many(engines, 40)
        assert 1 <= time.monotonic() - start < 5
        assert "silent" in engines.lost[fakes[0].url]


@pytest.mark.slow
async def test_a_long_generation_is_not_silence() -> None:
    fake = FakeServer(answer=slowly(3))
    async with pool(fake, health_timeout_s=1) as engines:
        await ask(engines)
        assert engines.lost == {}


async def test_a_server_whose_scheduler_stands_still_is_given_up() -> None:
    fakes = FakeServer(answer=slowly(60), reports_progress=True), FakeServer(reports_progress=True)
    async with pool(*fakes, work_timeout_s=0.4) as engines:
        await ask_many(engines, 40)
        assert list(engines.lost) == [fakes[0].url]
        assert engines.lost[fakes[0].url].startswith("it finished no batch for ")
        assert engines.usage.requests == 40


@pytest.mark.slow
async def test_work_a_pause_and_silence_about_it_are_no_standstill() -> None:
    works, pauses, old = fakes = (
        FakeServer(answer=slowly(2.5), reports_progress=True),
        FakeServer(answer=slowly(2.5), reports_progress=True, paused=True),
        FakeServer(answer=slowly(2.5)),
    )
    async with pool(*fakes, work_timeout_s=1) as engines:
        asked = asyncio.create_task(ask_many(engines, 30))
        while not asked.done():
            works.batches += 1
            await asyncio.sleep(0.02)
        await asked
        assert engines.lost == {}
        assert min(works.answered, pauses.answered, old.answered) > 0


@pytest.mark.slow
async def test_a_server_that_ends_no_request_is_lost_though_it_answers_pings() -> None:
    fakes = FakeServer(answer=slowly(60)), FakeServer()
    async with pool(*fakes, request_timeout_s=1) as engines:
        await ask_many(engines, 40)
        assert "did not answer generate within 1 s" in engines.lost[fakes[0].url]


@pytest.mark.slow
async def test_a_call_that_fails_while_its_server_is_given_up_leaves_no_error_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its deadline expired in the same step of the event loop: the cancellation becomes its own exception."""
    begun = asyncio.Event()

    async def generate(self: EngineClient, input_ids: Sequence[int], **asked: Any) -> list[Generation]:
        begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise EngineSilent("did not answer generate within 1 s") from None
        return []

    monkeypatch.setattr(EngineClient, "generate", generate)
    unread: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unread.append(context))
    async with pool(FakeServer()) as engines:
        asked = asyncio.create_task(ask(engines))
        await begun.wait()
        engines._mark_lost(engines._live[0], "it is gone")
        with pytest.raises(NoEngineLeft):
            await asked
        await asyncio.sleep(0.05)
    del asked
    gc.collect()
    assert unread == []


@pytest.mark.slow
async def test_a_request_that_is_too_slow_at_a_server_that_works_is_its_own_failure() -> None:
    async def answer(body: dict[str, Any]) -> None:
        await asyncio.sleep(60 if body["sampling_params"]["n"] == 2 else 0)

    fake = FakeServer(answer=answer)
    async with pool(fake, request_timeout_s=1) as engines:
        slow = asyncio.create_task(ask(engines, n=2))
        await asyncio.sleep(0.5)
        await ask(engines)
        with pytest.raises(RunError, match="within 1 s"):
            await slow
        assert engines.lost == {}


async def test_one_broken_connection_condemns_nobody() -> None:
    fakes = FakeServer(), FakeServer()
    async with pool(*fakes) as engines:
        fakes[0].reset_next = fakes[1].reset_next = 1
        await ask_many(engines, 20)
        assert engines.lost == {}
        assert engines.usage.retried == 2


async def test_a_request_that_breaks_every_connection_fails_alone() -> None:
    fakes = FakeServer(reset_next=1000), FakeServer(reset_next=1000)
    async with pool(*fakes) as engines:
        with pytest.raises(RunError, match="gone during generate"):
            await ask(engines)
        assert engines.lost == {}
        assert sum(len(fake.bodies) for fake in fakes) == 4
        assert all(fake.bodies for fake in fakes)  # both were tried


async def test_a_refusal_is_no_loss() -> None:
    async def refuse(body: dict[str, Any]) -> web.Response:
        return web.Response(text="Internal Server Error", status=500)

    fake = FakeServer(answer=refuse)
    async with pool(fake) as engines:
        with pytest.raises(RunError, match=rf"{fake.url} refused generate \(500\): Internal") as caught:
            await ask(engines)
        assert not isinstance(caught.value, NoEngineLeft)
        assert engines.lost == {}


async def test_other_weights_than_announced_never_enter_a_batch() -> None:
    fakes = FakeServer(version="default"), FakeServer()
    async with pool(*fakes) as engines:
        await ask_many(engines, 20)
        assert "version -1 instead of 1" in engines.lost[fakes[0].url]
        answers = await asyncio.gather(*(ask(engines, f"task {i}") for i in range(20)))
        assert {version for answer in answers for version in answer[0].versions_T} == {1}


@pytest.mark.parametrize("sampling_goes_on", [True, False])
async def test_an_answer_in_flight_at_an_update_is_taken_where_sampling_goes_on(sampling_goes_on: bool) -> None:
    """It is of the older weights, and it comes after `use` has named the newer ones."""
    go_on = asyncio.Event()

    async def begun_before(body: dict[str, Any]) -> web.Response | None:
        await go_on.wait()
        return web.json_response([reply("1")])

    fake = FakeServer(answer=begun_before)
    async with pool(fake, updates_while_sampling=sampling_goes_on) as engines:
        asked = asyncio.create_task(ask(engines))
        await until(lambda: fake.bodies)
        fake.version = "2"
        engines.use([fake.url], 2)
        go_on.set()
        if sampling_goes_on:
            assert (await asked)[0].versions_T == (1, 1)
            assert engines.lost == {}
            with pytest.raises(NoEngineLeft, match="version 1 instead of 2"):  # asked for after the news
                await ask(engines)
        else:
            with pytest.raises(NoEngineLeft, match="version 1 instead of 2"):
                await asked


async def test_a_server_restarted_under_its_old_address_is_found_out_by_the_ping() -> None:
    fakes = FakeServer(answer=slowly(1.5)), FakeServer()
    async with pool(*fakes, health_timeout_s=1) as engines:
        asked = asyncio.create_task(ask_many(engines, 20))
        await until(lambda: fakes[0].bodies)
        fakes[0].version = "default"
        await asked
        assert "instead of 1" in engines.lost[fakes[0].url]
        assert fakes[0].answered == 0


async def test_without_any_server_left_callers_hear_of_it_at_once() -> None:
    fakes = FakeServer(answer=slowly(60)), FakeServer(answer=slowly(60))
    async with pool(*fakes) as engines:
        asked = [asyncio.create_task(ask(engines, f"task {i}")) for i in range(10)]
        await until(lambda: sum(len(fake.bodies) for fake in fakes) == 10)
        for fake in fakes:
            await fake.die()
        results = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), timeout=10)
        assert all(isinstance(result, NoEngineLeft) for result in results)
        assert set(engines.lost) == {fake.url for fake in fakes}
        engines.use([], 2)
        with pytest.raises(NoEngineLeft, match="none is live yet"):
            await ask(engines)


async def test_a_caller_that_is_cancelled_leaves_nothing_behind() -> None:
    fake = FakeServer(answer=slowly(60))
    async with pool(fake) as engines:
        asked = asyncio.create_task(ask(engines, n=4))
        await until(lambda: fake.bodies)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        fake.answer = None
        await ask(engines)
        assert engines._live[0].sequences == 0
        assert engines.usage.retried == 0


async def test_metrics_of_a_step() -> None:
    fakes = FakeServer(), FakeServer()
    async with pool(*fakes) as engines:
        await ask_many(engines, 10)
        before = engines.usage.copy()
        await ask_many(engines, 30)
        metrics = values(engines.usage.since(before).figures(live=engines.live, lost=0, seconds=2))
        assert metrics["rollout/generated_tokens"] == 60
        assert metrics["rollout/tokens_per_s"] == 30
        assert metrics["rollout/cached_share"] == 0.5
        assert metrics["engine/live"] == 2
        assert metrics["engine/retried"] == 0
        assert metrics["engine/share_min"] + metrics["engine/share_max"] == pytest.approx(1)
