"""Losing real SGLang servers in the middle of generate calls, and prefixes that outlive no weight version."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from collab_megatron.config.sections import EngineSection
from collab_megatron.engine.control import EngineControl
from collab_megatron.engine.pool import EnginePool
from collab_megatron.engine.server_args import engine_command
from collab_megatron.launch.ports import free_port
from tests.conftest import Server
from tests.engine.real_servers import server_supervisor

pytestmark = pytest.mark.slow
VERSION = 3


@pytest.fixture(scope="module")
def doomed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A second server, which a test may stop or kill; under a supervisor of its own, which ignores it."""
    section = EngineSection(max_total_tokens=16384, max_running_requests=64)
    command = engine_command(
        section, model_path=str(tiny_model), dtype="float32", device="cpu", port=free_port(), seed=1
    )
    with server_supervisor(tmp_path_factory.mktemp("logs")) as supervisor:
        child = supervisor.start("doomed", command.argv, command.env)
        control = EngineControl(command.url, timeout_s=120)
        control.wait_until_ready(timeout_s=180, alive=lambda: child.process.poll() is None)
        control.close()
        name_weights(command.url)
        yield Server(url=command.url, pid=child.process.pid)
        os.killpg(child.process.pid, signal.SIGCONT)


@pytest.fixture
def survivor(tiny_engine: Server) -> Server:
    name_weights(tiny_engine.url)
    return tiny_engine


def name_weights(url: str, version: int = VERSION) -> None:
    body = {"new_version": str(version), "abort_all_requests": False}
    reply = httpx.post(f"{url}/update_weight_version", json=body, timeout=30, trust_env=False)
    assert reply.json()["success"], reply.text


def engine_pool(health_timeout_s: float, work_timeout_s: float = 60) -> EnginePool:
    return EnginePool(
        stop_token_ids=[],
        request_timeout_s=120,
        health_timeout_s=health_timeout_s,
        work_timeout_s=work_timeout_s,
        max_concurrency=16,
    )


def scheduler_of(server: Server) -> psutil.Process:
    """The process behind its HTTP side that runs the model, by the name that SGLang gives it."""
    (found,) = [
        child
        for child in psutil.Process(server.pid).children(recursive=True)
        if "scheduler" in " ".join(child.cmdline())
    ]
    return found


async def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


async def running(server: Server, calls: Sequence[asyncio.Task[Any]]) -> None:
    """Until the server works on some of the calls. It publishes its load now and then only."""
    async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
        while not (load := (await client.get(f"{server.url}/v1/loads")).json()["loads"][0])["num_running_reqs"]:
            assert not any(call.done() for call in calls), f"the calls ended before the load showed them: {load}"
            await asyncio.sleep(0.01)


async def generate_while(pool: EnginePool, doomed: Server, happens: Callable[[], None]) -> None:
    """64 calls of at most 64 tokens, all answered, although `happens` hits `doomed` once it works."""

    async def ask(i: int) -> None:
        (generation,) = await pool.generate(
            [3, 40 + i, 41, 42, 2, 4], n=1, temperature=1.0, max_new_tokens=64, affinity=f"task {i}"
        )
        assert set(generation.versions_T) == {VERSION}

    calls = [asyncio.create_task(ask(i)) for i in range(64)]
    await until(lambda: pool.usage.generated_by.get(doomed.url, 0) >= 3 * 64)
    happens()
    assert sum(not call.done() for call in calls) > 8
    await asyncio.wait_for(asyncio.gather(*calls), timeout=120)


# the order matters: a stopped server goes on later, a killed one does not


async def test_a_stopped_server_is_given_up_and_all_its_calls_end_elsewhere(survivor: Server, doomed: Server) -> None:
    async with engine_pool(health_timeout_s=3) as pool:
        pool.use([survivor.url, doomed.url], VERSION)
        start = time.monotonic()
        await generate_while(pool, doomed, lambda: os.killpg(doomed.pid, signal.SIGSTOP))
        print(f"stopped: {time.monotonic() - start:.1f} s for 64 calls, {pool.usage.retried} retried, {pool.lost}")
        assert list(pool.lost) == [doomed.url]
        assert "silent for" in pool.lost[doomed.url]
        assert pool.usage.requests == 64
        os.killpg(doomed.pid, signal.SIGCONT)


async def test_a_stopped_scheduler_is_given_up_though_its_http_side_is_well(survivor: Server, doomed: Server) -> None:
    """A pause twice as long, as in a weight sync, does not count."""
    scheduler = scheduler_of(doomed)
    async with engine_pool(health_timeout_s=60, work_timeout_s=4) as pool:
        pool.use([doomed.url], VERSION)
        control = EngineControl(doomed.url, timeout_s=30)
        asked = [
            asyncio.create_task(pool.generate([3, 40 + i, 2, 4], n=4, temperature=1.0, max_new_tokens=400))
            for i in range(8)
        ]
        await asyncio.wait_for(running(doomed, asked), timeout=60)
        await asyncio.to_thread(control.pause)
        await asyncio.sleep(8)
        assert not any(call.done() for call in asked)
        assert pool.lost == {}
        await asyncio.to_thread(control.resume)
        await asyncio.gather(*asked)
        assert pool.lost == {}

        pool.use([survivor.url, doomed.url], VERSION)
        start = time.monotonic()
        await generate_while(pool, doomed, scheduler.suspend)
        print(f"scheduler stopped: {time.monotonic() - start:.1f} s for 64 calls, {pool.usage.retried} retried")
        assert list(pool.lost) == [doomed.url]
        assert pool.lost[doomed.url].startswith("it finished no batch for ")
        assert control.answers(timeout_s=30)
        assert pool.usage.requests == 8 + 64
        scheduler.resume()
        control.close()


async def test_a_killed_server_is_lost_at_once_and_all_its_calls_end_elsewhere(
    survivor: Server, doomed: Server
) -> None:
    async with engine_pool(health_timeout_s=60) as pool:
        pool.use([survivor.url, doomed.url], VERSION)
        start = time.monotonic()
        await generate_while(pool, doomed, lambda: os.killpg(doomed.pid, signal.SIGKILL))
        print(f"killed: {time.monotonic() - start:.1f} s for 64 calls, {pool.usage.retried} retried, {pool.lost}")
        assert list(pool.lost) == [doomed.url]
        assert "gone during generate" in pool.lost[doomed.url]
        assert pool.usage.requests == 64
        assert pool.usage.retried > 0


async def test_a_prefix_serves_only_the_version_that_computed_it(survivor: Server) -> None:
    async with engine_pool(health_timeout_s=60) as pool:

        async def cached() -> int:
            (generation,) = await pool.generate(range(20, 60), n=1, temperature=1.0, max_new_tokens=2)
            return generation.cached_tokens

        pool.use([survivor.url], VERSION)
        await cached()
        assert await cached() == 39  # all but the last token
        await asyncio.to_thread(name_weights, survivor.url, VERSION + 1)
        pool.use([survivor.url], VERSION + 1)
        assert await cached() == 0
        assert await cached() == 39
