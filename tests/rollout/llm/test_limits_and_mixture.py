"""Limits per minute that are waited for, several simulators in one role, and the schema of a reply."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from typing import Any

import pytest

from collab_megatron.config.roles import evaluation_roles
from collab_megatron.config.sections import (
    DeploymentSection,
    EvaluationSection,
    LLMSection,
    SimulatorSection,
    SimulatorsSection,
    UserSection,
)
from collab_megatron.errors import UserError
from collab_megatron.rollout.llm import Gateway, GatewaySnapshot, SimulatorError, evaluation_users
from collab_megatron.rollout.llm import deployments as module
from collab_megatron.rollout.llm.deployments import RateLimit
from collab_megatron.rollout.llm.gateway import draw_part
from collab_megatron.rollout.llm.role_client import RoleClient
from collab_megatron.types import Message
from tests.rollout.fakes import TASK
from tests.rollout.llm.calls import HELLO, closed_port, config_for, good, hello, use_role
from tests.rollout.llm.misbehaving import MisbehavingEndpoint

SCHEMA = {"type": "object", "properties": {"response": {"type": "string"}}, "required": ["response"]}


def test_a_bucket_lets_a_burst_go_and_then_keeps_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    bucket = RateLimit(120)  # 2 a second, 10 at once
    for _ in range(10):
        assert bucket.delay_s(1) == 0
        bucket.pay(1)
    assert bucket.delay_s(1) == pytest.approx(0.5)
    bucket.pay(1)  # a waiting call has paid: the next one comes after it
    assert bucket.delay_s(1) == pytest.approx(1.0)
    now = 100.0
    assert bucket.delay_s(10) == 0
    assert bucket.delay_s(1000) == 0  # more than ever fits goes when the bucket is full
    bucket.pay(1000)
    assert bucket.delay_s(1) == pytest.approx(991 / 2)
    bucket.pay(-1000)
    assert bucket.delay_s(10) == 0


async def ask(role: RoleClient, count: int) -> None:
    await asyncio.gather(*(role.complete(hello(sample_index=index)) for index in range(count)))


@pytest.mark.slow
def test_requests_per_minute_are_waited_for() -> None:
    with MisbehavingEndpoint(good) as endpoint:
        began = time.monotonic()
        _, usage = use_role(config_for(endpoint.url, requests_per_minute=240), lambda role: ask(role, 26))
        seconds = time.monotonic() - began
    assert seconds >= 1.4  # 20 at once, then 4 a second
    assert usage.paced_s > 1.4
    assert (usage.failures, usage.rate_limited) == (0, 0)


def test_tokens_per_minute_are_waited_for_by_what_the_answers_really_had() -> None:
    with MisbehavingEndpoint(good) as endpoint:

        async def body(role: RoleClient) -> float:
            for index in range(4):  # 110 tokens each, out of 550 at once
                await role.complete(hello(sample_index=index))
            began = time.monotonic()
            await ask(role, 4)
            return time.monotonic() - began

        config = config_for(endpoint.url, tokens_per_minute=6600, max_tokens=50)
        seconds, usage = use_role(config, body)
    assert usage.prompt_tokens + usage.completion_tokens == 880
    assert seconds < 4.0
    assert usage.failures == 0


def test_a_call_waits_only_if_no_deployment_has_room() -> None:
    with MisbehavingEndpoint(good) as tight, MisbehavingEndpoint(good) as wide:
        config = config_for(tight.url, wide.url, requests_per_minute=12)  # one at once, then one in 5 s
        began = time.monotonic()
        use_role(config, lambda role: ask(role, 30))
        assert time.monotonic() - began < 3.0
        assert tight.counts["good"] <= 1
        assert tight.counts["good"] + wide.counts["good"] == 30


def test_no_room_within_the_deadline_ends_the_call_at_once() -> None:
    async def body(role: RoleClient) -> None:
        await role.complete(HELLO)
        began = time.monotonic()
        with pytest.raises(SimulatorError, match="limits per minute"):
            await role.complete(hello(sample_index=1))
        assert time.monotonic() - began < 1.0

    with MisbehavingEndpoint(good) as endpoint:
        use_role(config_for(endpoint.url, requests_per_minute=2, deadline_s=3.0), body)


def mixture(url: str) -> UserSection:
    def part(name: str, weight: float) -> dict[str, Any]:
        return {"model": f"hosted_vllm/{name}", "api_base": url, "api_key_env": None, "weight": weight}

    others = tuple(SimulatorSection(**part(name, weight)) for name, weight in (("b", 2.0), ("c", 1.0)))
    return UserSection(**part("a", 1.0), mixture=others)


def test_a_conversation_keeps_its_simulator_and_each_has_its_own_counters() -> None:
    async def main(url: str) -> tuple[list[int], GatewaySnapshot]:
        gateway = Gateway({"user": mixture(url)}, 7)
        try:
            for turn in range(2):
                for index in range(40):
                    request = hello(messages=[*HELLO.messages] * (1 + turn), sample_index=index)
                    (model,) = await gateway.role("user").complete(request)
                    assert model == "abc"[gateway.part("user", index)]
            return [gateway.part("user", index) for index in range(40)], gateway.snapshot()
        finally:
            await gateway.close()

    with MisbehavingEndpoint(lambda body: body["model"]) as endpoint:
        parts, after = asyncio.run(main(endpoint.url))
        counts = {model: counts["good"] for model, counts in endpoint.counts_of.items()}
    assert counts == {"abc"[part]: 2 * count for part, count in Counter(parts).items()}
    assert {name: usage.calls for name, usage in after.roles.items()} == {
        "user": counts["a"],
        "user-1": counts["b"],
        "user-2": counts["c"],
    }


@pytest.mark.parametrize(("with_mixture", "own"), [(True, {"a", "b", "c"}), (False, {"a"})])
def test_an_evaluation_has_further_users_and_may_leave_the_mixture_out(with_mixture: bool, own: set[str]) -> None:
    async def main(url: str) -> list[str]:
        simulators = SimulatorsSection(user=mixture(url))
        further = LLMSection(model="hosted_vllm/terse", api_base=url, api_key_env=None)
        evaluation = EvaluationSection(mixture=with_mixture, users={"terse": further})
        gateway = Gateway({"user": simulators.user, **evaluation_roles(evaluation)}, 7)
        try:
            users = evaluation_users(simulators, evaluation, gateway)
            assert list(users) == ["", "terse"]
            for user in users.values():
                for index in range(-30, 0):
                    await user.reply(TASK, [Message("assistant", "when?")], sample_index=index)
            return sorted(name for name, usage in gateway.snapshot().roles.items() if usage.calls)
        finally:
            await gateway.close()

    with MisbehavingEndpoint(lambda body: json.dumps({"thought": "", "response": body["model"]})) as endpoint:
        roles = asyncio.run(main(endpoint.url))
        assert {model for model, counts in endpoint.counts_of.items() if counts["good"]} == {*own, "terse"}
    assert roles == sorted([*(f"user-{n}" if n else "user" for n in range(len(own))), "user-terse"])


def test_the_shares_of_a_mixture_follow_the_weights() -> None:
    drawn = Counter(draw_part([1.0, 2.0, 1.0], 3, "user", index) for index in range(8000))
    assert [round(drawn[part] / 8000, 1) for part in range(3)] == [0.2, 0.5, 0.2]
    other = [draw_part([1.0, 2.0, 1.0], 4, "user", index) for index in range(100)]
    assert other != [draw_part([1.0, 2.0, 1.0], 3, "user", index) for index in range(100)]
    assert {draw_part([5.0], 1, "judge", index) for index in range(10)} == {0}


def test_every_deployment_of_every_part_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    async def reach(section: LLMSection) -> None:
        await Gateway({"user": section}, 1).check_reachable(2.0)

    with MisbehavingEndpoint(good) as endpoint:
        asyncio.run(reach(mixture(endpoint.url)))
        with pytest.raises(UserError, match=r"simulators\.user\.deployments\.0\.api_base"):
            asyncio.run(reach(config_for(endpoint.url, closed_port())))
        users = mixture(endpoint.url)
        sick = users.mixture[1].model_copy(update={"api_base": closed_port()})
        with pytest.raises(UserError, match=r"simulators\.user\.mixture\.1\.api_base"):
            asyncio.run(reach(users.model_copy(update={"mixture": (users.mixture[0], sick)})))
        monkeypatch.delenv("NO_SUCH_KEY", raising=False)
        keyed = DeploymentSection(model="hosted_vllm/m", api_base=endpoint.url, api_key_env="NO_SUCH_KEY")
        with pytest.raises(UserError, match=r"simulators\.user\.deployments\.0.*NO_SUCH_KEY"):
            Gateway({"user": config_for(endpoint.url).model_copy(update={"deployments": (keyed,)})}, 1)


@pytest.mark.parametrize("provider", ["hosted_vllm", "openai"])
def test_a_schema_is_sent_where_the_config_wants_it(provider: str) -> None:
    async def body(role: RoleClient) -> None:
        await role.complete(hello(json_reply=True, schema=SCHEMA))
        await role.complete(hello(json_reply=True))

    wanted = {"type": "json_schema", "json_schema": {"name": "reply", "strict": True, "schema": SCHEMA}}
    with MisbehavingEndpoint(good) as endpoint:
        use_role(config_for(endpoint.url, provider=provider, response_format="json_schema"), body)
        use_role(config_for(endpoint.url, provider=provider), body)
        formats = [request["response_format"] for request in endpoint.requests]
    assert formats == [wanted, *[{"type": "json_object"}] * 3]


def test_the_limits_are_divided_among_the_processes() -> None:
    with MisbehavingEndpoint(good, delay_s=0.05) as endpoint:

        async def body(role: RoleClient) -> float:
            await ask(role, 9)
            return role.limiter.limit

        limit, _ = use_role(config_for(endpoint.url, max_concurrency=9), body, shards=3)
    assert limit == 3
