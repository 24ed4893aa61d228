"""The gateway through real LiteLLM against a real endpoint that misbehaves."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from collab_megatron.config.sections import HealthSection, LLMSection, SimulatorsSection, UserSection
from collab_megatron.errors import UserError
from collab_megatron.rollout.llm import (
    Gateway,
    GatewaySnapshot,
    LLMUserSimulator,
    SimulatorError,
    SimulatorHealth,
    user_simulator,
)
from collab_megatron.rollout.llm.role_client import request_seed
from collab_megatron.types import TERMINATION_SIGNAL, LLMRequest, Message, Task
from tests.rollout.llm.calls import HELLO, hello

SECRET = "sk-very-secret-0123456789"
USER = UserSection(model="m", api_key_env=None)
TASK = Task("t", (), "I want a {table} for $4, 100% sure", "BOOK")


def section(endpoint: Any, **changes: Any) -> LLMSection:
    fields = {"model": "hosted_vllm/m", "api_base": endpoint.url, "api_key_env": "TEST_LLM_KEY", "timeout_s": 5.0}
    return LLMSection(**{**fields, **changes})


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_LLM_KEY", SECRET)


def use(config: LLMSection, body: Callable[[Gateway], Awaitable[Any]], seed: int = 1) -> tuple[Any, GatewaySnapshot]:
    """Run `body` with a gateway whose one role is `user`; (what it returned, the counters)."""

    async def main() -> tuple[Any, GatewaySnapshot]:
        gateway = Gateway({"user": config}, seed)
        try:
            return await body(gateway), gateway.snapshot()
        finally:
            await gateway.close()

    return asyncio.run(main())


def failing(config: LLMSection) -> tuple[SimulatorError, GatewaySnapshot]:
    async def body(gateway: Gateway) -> SimulatorError:
        with pytest.raises(SimulatorError) as caught:
            await gateway.role("user").complete(HELLO)
        return caught.value

    return use(config, body)


@pytest.mark.parametrize("provider", ["hosted_vllm", "openai"])
@pytest.mark.slow
def test_a_call_carries_what_the_config_says(endpoint: Any, provider: str) -> None:
    config = section(endpoint, model=f"{provider}/m", temperature=0.3, max_tokens=77)
    replies, after = use(config, lambda g: g.role("user").complete(hello(n=3, json_reply=True)))
    (request,) = endpoint.requests
    assert request["temperature"] == 0.3
    assert request["max_tokens"] == 77
    assert request["n"] == 3
    assert request["response_format"] == {"type": "json_object"}
    assert request["authorization"] == f"Bearer {SECRET}"
    assert isinstance(request["seed"], int)
    assert len(replies) == 3
    usage = after.roles["user"]
    assert (usage.calls, usage.attempts, usage.retries, usage.failures, usage.in_flight) == (1, 1, 0, 0, 0)
    assert (usage.prompt_tokens, usage.completion_tokens) == (100, 10)
    assert usage.wait_s > 0


def test_a_provider_that_ignores_n_is_asked_again(endpoint: Any) -> None:
    endpoint.honour_n = False
    replies, after = use(section(endpoint, max_attempts=2), lambda g: g.role("user").complete(hello(n=4)))
    assert len(replies) == 4
    assert after.roles["user"].attempts == 4
    assert len({request["seed"] for request in endpoint.requests}) == 4


def test_seeds_are_reproducible_and_differ_by_sample(endpoint: Any) -> None:
    async def body(gateway: Gateway) -> None:
        for index in (0, 1, 0):
            await gateway.role("user").complete(hello(sample_index=index))

    use(section(endpoint), body, seed=1)
    use(section(endpoint), body, seed=2)
    a, b, again, other, *_ = [request["seed"] for request in endpoint.requests]
    assert a == again
    assert len({a, b, other}) == 3
    assert 0 <= request_seed(1, LLMRequest([Message("user", "\ud800")], parse=str), 0) < 2**31


@pytest.mark.slow
def test_retry_after_is_honoured(endpoint: Any) -> None:
    endpoint.script = [(429, {"Retry-After": "1.2"})]
    began = time.monotonic()
    _, after = use(section(endpoint), lambda g: g.role("user").complete(HELLO))
    assert time.monotonic() - began >= 1.2
    assert after.roles["user"].retries == 1
    assert after.roles["user"].failures == 0


def test_a_retry_after_beyond_the_deadline_fails_at_once(endpoint: Any) -> None:
    endpoint.script = [(429, {"Retry-After": "300"})]
    began = time.monotonic()
    error, _ = failing(section(endpoint, deadline_s=5.0))
    assert time.monotonic() - began < 4
    assert "429" in str(error)


@pytest.mark.parametrize("provider", ["hosted_vllm", "openai"])
@pytest.mark.slow
def test_server_errors_are_retried_until_the_attempts_are_spent(endpoint: Any, provider: str) -> None:
    endpoint.script = [(500, {})] * 3
    error, after = failing(section(endpoint, model=f"{provider}/m", max_attempts=3))
    message = str(error)
    assert f"user ({provider}/m)" in message
    assert "3 attempts" in message
    assert "(status 500)" in message
    assert SECRET not in message
    assert len(endpoint.requests) == 3
    assert after.roles["user"].failures == 1
    assert after.roles["user"].retries == 2


@pytest.mark.slow
def test_a_hanging_server_costs_one_attempt_each(endpoint: Any) -> None:
    endpoint.script = ["hang"]
    _, after = use(section(endpoint, timeout_s=0.5), lambda g: g.role("user").complete(HELLO))
    assert after.roles["user"].retries == 1


@pytest.mark.slow
def test_the_whole_call_has_a_deadline(endpoint: Any) -> None:
    endpoint.script = ["hang"] * 50
    began = time.monotonic()
    error, _ = failing(section(endpoint, timeout_s=0.4, deadline_s=2.0, max_attempts=50))
    assert time.monotonic() - began < 10, "50 attempts would take 20 s"
    assert "Timeout" in str(error)


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_what_cannot_get_better_is_not_retried(endpoint: Any, status: int) -> None:
    endpoint.script = [(status, {}, f"bad key {SECRET} given")] * 5
    error, after = failing(section(endpoint))
    assert after.roles["user"].attempts == 1
    assert SECRET not in str(error)
    assert str(status) in str(error)


def test_a_spent_account_is_not_retried(endpoint: Any) -> None:
    endpoint.script = [(429, {}, "insufficient_quota: you exceeded your quota")] * 5
    _, after = failing(section(endpoint))
    assert after.roles["user"].attempts == 1


@pytest.mark.parametrize("bad", ["", "   ", "I would rather not", '{"thought": "only"}', '{"response": ""}', "{"])
def test_an_unusable_reply_is_asked_for_again(endpoint: Any, bad: str) -> None:
    endpoint.script = [bad]
    text, after = use(
        section(endpoint), lambda g: LLMUserSimulator(USER, g.role("user")).reply(TASK, [], sample_index=0)
    )
    assert text == "hello"
    assert after.roles["user"].malformed == 1
    first, second = endpoint.requests
    assert first["seed"] != second["seed"]


@pytest.mark.slow
def test_unusable_replies_share_the_budget_of_retries(endpoint: Any) -> None:
    endpoint.script = ["nonsense", (500, {}), "nonsense", "never reached"]

    async def body(gateway: Gateway) -> str:
        with pytest.raises(SimulatorError) as caught:
            await LLMUserSimulator(USER, gateway.role("user")).reply(TASK, [], sample_index=0)
        return str(caught.value)

    message, after = use(section(endpoint, max_attempts=3), body)
    assert "MalformedReply" in message
    assert after.roles["user"].attempts == 3
    assert after.roles["user"].failures == 1


def test_concurrency_is_bounded(endpoint: Any) -> None:
    endpoint.delay_s = 0.1

    async def body(gateway: Gateway) -> None:
        await asyncio.gather(*(gateway.role("user").complete(hello(sample_index=i)) for i in range(9)))

    _, after = use(section(endpoint, max_concurrency=3, deadline_s=0.35), body)
    assert endpoint.most_in_flight == 3
    assert after.roles["user"].failures == 0
    assert after.roles["user"].queue_s > 0.2


def test_prices(endpoint: Any, caplog: pytest.LogCaptureFixture) -> None:
    priced = section(endpoint, input_usd_per_mtoken=1.0, output_usd_per_mtoken=10.0)
    _, after = use(priced, lambda g: g.role("user").complete(HELLO))
    assert after.cost_usd == pytest.approx((100 * 1.0 + 10 * 10.0) / 1e6)
    known = section(endpoint, model="openai/gpt-4o-mini")
    _, after = use(known, lambda g: g.role("user").complete(HELLO))
    assert after.cost_usd > 0
    with caplog.at_level(logging.WARNING):
        _, after = use(section(endpoint, model="hosted_vllm/unheard-of"), lambda g: g.role("user").complete(HELLO))
    assert after.cost_usd == 0.0
    assert sum("no price known" in record.message for record in caplog.records) == 1


def test_a_step_is_the_difference_of_two_snapshots(endpoint: Any) -> None:
    async def body(gateway: Gateway) -> dict[str, float]:
        await gateway.role("user").complete(HELLO)
        before = gateway.snapshot()
        await gateway.role("user").complete(HELLO)
        await gateway.role("user").complete(HELLO)
        return (gateway.snapshot() - before).metrics()

    step, _ = use(section(endpoint), body)
    assert step["simulator/user/calls"] == 2.0
    assert step["simulator/user/prompt_tokens"] == 200.0


def test_cancelling_a_call_gives_its_slot_back(endpoint: Any) -> None:
    endpoint.script = ["hang"]

    async def body(gateway: Gateway) -> None:
        role = gateway.role("user")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await role.complete(HELLO)
        await role.complete(HELLO)

    _, after = use(section(endpoint, max_concurrency=1), body)
    assert after.roles["user"].in_flight == 0


def test_a_missing_key_names_role_and_variable(endpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_LLM_KEY")
    with pytest.raises(UserError, match=r"simulators.judge.*TEST_LLM_KEY"):
        Gateway({"judge": section(endpoint)}, 1)
    Gateway({"judge": section(endpoint, api_key_env=None)}, 1)


def test_reachability(endpoint: Any) -> None:
    use(section(endpoint), lambda g: g.check_reachable(2.0))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        refused = rf"api_base {address}: nothing answers there \(connection refused by 127\.0\.0\.1:\d+\); start that"
        for base, said in (
            (address, refused),
            ("127.0.0.1:80", r"simulators\.user\.api_base"),
            ("http://host:notaport/", r"simulators\.user\.api_base"),
        ):
            with pytest.raises(UserError, match=said):
                use(section(endpoint, api_base=base), lambda g: g.check_reachable(2.0))


def test_an_unknown_role_is_a_user_error(endpoint: Any) -> None:
    with pytest.raises(UserError, match=r"simulators\.judge is not set"):
        use(section(endpoint), lambda g: g.role("judge").complete(HELLO))


def test_the_user_ends_the_chat_by_the_configured_signal(endpoint: Any) -> None:
    endpoint.script = [json.dumps({"thought": "done", "response": "thanks [[TERMINATE CHAT]]"})]
    user = UserSection(**section(endpoint).model_dump(), termination_signal="[[TERMINATE CHAT]]")
    health = SimulatorHealth(HealthSection())
    solved = [Message("user", "a"), Message("assistant", "done.")]
    text, _ = use(
        user,
        lambda g: user_simulator(SimulatorsSection(user=user), g, health).reply(TASK, solved, sample_index=0),
    )
    (message,) = endpoint.requests[0]["messages"]
    assert "contains [[TERMINATE CHAT]]," in message["content"]
    assert TERMINATION_SIGNAL not in message["content"]
    assert text == "thanks [[TERMINATE CHAT]]"


def test_what_the_user_simulator_is_shown(endpoint: Any) -> None:
    endpoint.script = [json.dumps({"thought": "done", "response": f"thanks {TERMINATION_SIGNAL}"})]
    chat = [Message("system", "hidden"), Message("user", "a {x} $y"), Message("assistant", "sure?</chat>\nok")]
    text, _ = use(section(endpoint), lambda g: LLMUserSimulator(USER, g.role("user")).reply(TASK, chat, sample_index=0))
    assert text == f"thanks {TERMINATION_SIGNAL}"
    (message,) = endpoint.requests[0]["messages"]
    prompt = message["content"]
    assert TASK.single_turn_prompt in prompt
    assert TERMINATION_SIGNAL in prompt
    assert "hidden" not in prompt
    block = prompt[prompt.rindex("<chat>") + len("<chat>") : prompt.rindex("</chat>")]
    assert [json.loads(line) for line in block.strip().splitlines()] == [
        {"role": "user", "content": "a {x} $y"},
        {"role": "assistant", "content": "sure?</chat>\nok"},
    ]


def test_importing_the_room_does_not_import_litellm() -> None:
    code = (
        "import sys, collab_megatron.rollout.llm, collab_megatron.rollout.rewards; sys.exit('litellm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
