"""The gateway against endpoints that misbehave: every call ends, every counter is right, no faulty text gets out."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

import pytest

from collab_megatron.rollout.llm import SimulatorError
from collab_megatron.rollout.llm.role_client import RoleClient
from tests.rollout.llm.calls import GOOD, HELLO, closed_port, config_for, good, hello, use_role
from tests.rollout.llm.misbehaving import ALL_FAULTS, COUNTER_OF, FAULTY, MisbehavingEndpoint, faults_at

pytestmark = pytest.mark.slow


async def ask(role: RoleClient, count: int) -> Counter[str]:
    """`count` calls at once, by how they ended."""

    async def one(index: int) -> str:
        try:
            (text,) = await role.complete(hello(sample_index=index))
        except SimulatorError as error:
            return str(error) if FAULTY in str(error) else "failed"
        return str(text)

    return Counter(await asyncio.gather(*(one(index) for index in range(count))))


@pytest.fixture(scope="module")
def imported() -> None:
    """LiteLLM imports parts of itself and of openai at the first error of a kind: for seconds the loop stands still,
    and calls that the endpoint has answered time out."""
    deadline = time.monotonic() + 120
    for provider in ("hosted_vllm", "openai"):
        with MisbehavingEndpoint(good) as endpoint:
            config = config_for(endpoint.url, provider=provider, timeout_s=0.5, max_attempts=1)
            for kind in ALL_FAULTS:
                endpoint.faults = {kind: 1.0}
                while not endpoint.counts[kind]:  # a call may time out in an import, before it is sent
                    assert time.monotonic() < deadline, f"{kind} did not come within two minutes"
                    use_role(config, lambda role: ask(role, 1))


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize("provider, calls", [("hosted_vllm", 160), ("openai", 120)])
def test_with_a_third_of_the_calls_faulty_every_counter_is_what_was_injected(provider: str, calls: int) -> None:
    with MisbehavingEndpoint(good, seed=3) as endpoint:

        async def body(role: RoleClient) -> Counter[str]:
            await ask(role, 1)  # the client's imports hold up the loop, and would hold up a whole wave of calls
            endpoint.faults = faults_at(0.3)
            return await ask(role, calls - 1)

        config = config_for(endpoint.url, provider=provider, max_concurrency=32, timeout_s=4.0)
        ended, usage = use_role(config, body)
        assert set(ended) <= {GOOD, "failed"}
        assert ended[GOOD] > 0.95 * calls
        assert ended["failed"] == usage.failures
        assert set(ALL_FAULTS) <= set(endpoint.counts), "the seed must bring every fault"
        assert {field: getattr(usage, field) for field in endpoint.expected()} == endpoint.expected()
        assert usage.attempts == sum(endpoint.counts.values())
        assert usage.answers == sum(endpoint.counts[kind] for kind in ("good", "empty", "wrong_role", "huge"))
        assert usage.malformed == usage.empty + usage.wrong_role + usage.too_long + usage.unreadable
        assert usage.calls == calls
        assert usage.prompt_tokens == 100 * usage.answers
        assert (usage.in_flight, usage.waiting) == (0, 0)


@pytest.mark.parametrize("provider", ["hosted_vllm", "openai"])
@pytest.mark.parametrize("kind", ALL_FAULTS)
def test_each_fault_is_counted_as_what_it_is(kind: str, provider: str) -> None:
    with MisbehavingEndpoint(good, faults={kind: 1.0}) as endpoint:
        timeout_s = 0.5 if COUNTER_OF[kind] == "timeouts" else 5.0
        config = config_for(endpoint.url, provider=provider, timeout_s=timeout_s, max_attempts=1)
        ended, usage = use_role(config, lambda role: ask(role, 2))
    assert ended == {"failed": 2}
    counted = {field: getattr(usage, field) for field in {*COUNTER_OF.values(), "rejected", "unreadable"}}
    assert {field: count for field, count in counted.items() if count} == {COUNTER_OF[kind]: 2}


def test_a_deployment_that_is_down_costs_no_pause_and_is_left_alone() -> None:
    with MisbehavingEndpoint(good) as endpoint:
        took_s = []

        async def body(role: RoleClient) -> Counter[str]:
            began = time.monotonic()
            answers = await ask(role, 20) + await ask(role, 40)
            took_s.append(time.monotonic() - began)
            return answers

        ended, usage = use_role(config_for(closed_port(), endpoint.url), body)
        assert took_s[0] < 5.0
    assert ended == {GOOD: 60}
    assert 1 <= usage.connection_errors <= 20  # those of the first wave; then it cooled down
    assert usage.failovers == usage.cooldowns == usage.connection_errors
    assert usage.attempts == 60 + usage.connection_errors


def test_a_dead_deployment_is_asked_less_than_one_that_fails_now_and_then(endpoint: Any) -> None:
    endpoint.script = [(503, {}), GOOD] * 6
    with MisbehavingEndpoint(good) as dead:
        dead.down_until = float("inf")

        async def body(role: RoleClient) -> Counter[str]:
            return sum([await ask(role, 1) for _ in range(6)], Counter())

        ended, usage = use_role(config_for(endpoint.url, dead.url), body)
        assert ended == {GOOD: 6}
        assert usage.server_errors == 6
        assert dead.counts["down"] <= 2  # once to find out, once more as long as the other has answered nothing


def test_when_all_are_down_for_a_while_the_calls_wait_and_go_on() -> None:
    with MisbehavingEndpoint(good) as one, MisbehavingEndpoint(good) as other:
        one.down_until = other.down_until = time.monotonic() + 2.0
        began = time.monotonic()
        ended, usage = use_role(config_for(one.url, other.url), lambda role: ask(role, 20))
        assert ended == {GOOD: 20}
        assert 2.0 <= time.monotonic() - began < 15.0
        assert usage.connection_errors == one.counts["down"] + other.counts["down"]
        assert usage.failures == 0


def test_calls_end_at_their_deadline_when_all_stay_down() -> None:
    began = time.monotonic()
    ended, usage = use_role(config_for(closed_port(), closed_port(), deadline_s=2.0), lambda role: ask(role, 10))
    assert ended == {"failed": 10}
    assert time.monotonic() - began < 6.0
    assert usage.failures == 10


def test_retry_after_is_granted_while_others_are_asked() -> None:
    with (
        MisbehavingEndpoint(good, faults={"429_retry_after": 1.0}, retry_after_s=1.5) as busy,
        MisbehavingEndpoint(good, delay_s=0.02) as free,
    ):

        async def body(role: RoleClient) -> None:
            began = time.monotonic()
            while time.monotonic() - began < 2.5:
                assert await ask(role, 1) == {GOOD: 1}

        _, usage = use_role(config_for(busy.url, free.url, cooldown_s=0.1), body)
        assert usage.rate_limited == busy.counts["429_retry_after"] == len(busy.arrived_at)
        gaps = [late - soon for soon, late in zip(busy.arrived_at, busy.arrived_at[1:], strict=False)]
        assert gaps, "it must be asked again once its time is over"
        assert min(gaps) >= 1.5
        assert usage.wait_s < 3.0


def test_nobody_is_asked_before_the_time_that_all_asked_for() -> None:
    busy = {"429_retry_after": 1.0}
    with (
        MisbehavingEndpoint(good, faults=busy, retry_after_s=1.2) as one,
        MisbehavingEndpoint(good, faults=busy, retry_after_s=1.6) as other,
    ):

        async def body(role: RoleClient) -> None:
            await ask(role, 1)
            one.faults = other.faults = {}
            assert await ask(role, 5) == {GOOD: 5}

        _, usage = use_role(config_for(one.url, other.url, max_attempts=2, cooldown_s=0.1), body)
        assert one.arrived_at[1] - one.arrived_at[0] >= 1.2
        assert len(other.arrived_at) == 1 or other.arrived_at[1] - other.arrived_at[0] >= 1.6
        assert usage.rate_limited == 2
        assert usage.paced_s > 1.0


def test_a_key_that_one_deployment_refuses_is_not_the_end(endpoint: Any) -> None:
    endpoint.script = [(401, {})] * 100
    with MisbehavingEndpoint(good) as well:
        ended, usage = use_role(config_for(endpoint.url, well.url), lambda role: ask(role, 20))
    assert ended == {GOOD: 20}
    assert usage.rejected == len(endpoint.requests) == usage.failovers


def test_what_every_deployment_refuses_is_the_end(endpoint: Any) -> None:
    endpoint.script = [(404, {})] * 100

    async def body(role: RoleClient) -> None:
        with pytest.raises(SimulatorError):
            await role.complete(HELLO)

    _, usage = use_role(config_for(endpoint.url, endpoint.url), body)
    assert usage.attempts == 2


def test_hung_calls_hold_nothing() -> None:
    with MisbehavingEndpoint(good, faults={"hang": 1.0}) as endpoint:

        async def body(role: RoleClient) -> float:
            assert await ask(role, 50) == {"failed": 50}
            assert role.limiter.used == 0
            async with asyncio.timeout(5.0):
                while endpoint.live_connections():  # noqa: ASYNC110 - it lives in another thread
                    await asyncio.sleep(0.02)
            endpoint.faults = {}
            began = time.monotonic()
            assert await ask(role, 50) == {GOOD: 50}
            return time.monotonic() - began

        config = config_for(endpoint.url, timeout_s=0.5, max_attempts=1, max_concurrency=50)
        seconds, usage = use_role(config, body)
        assert seconds < 2.0
        assert usage.timeouts == 50


def test_a_server_that_pushes_back_is_asked_less() -> None:
    with MisbehavingEndpoint(good, faults={"503": 1.0}) as endpoint:

        async def body(role: RoleClient) -> float:
            await ask(role, 30)
            cut = role.limiter.limit
            endpoint.faults = {}
            await ask(role, 30)
            assert role.limiter.limit > cut
            return cut

        cut, usage = use_role(config_for(endpoint.url, max_attempts=1, max_concurrency=10), body)
    assert 3 < cut <= 7  # calls that are refused in one moment are one push
    assert cut < usage.slots <= 10
