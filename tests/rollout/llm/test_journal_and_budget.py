"""Answers that are on disk before they are used, a replay that asks nobody, and what all of it has cost."""

from __future__ import annotations

import asyncio
import json
import logging
import traceback
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from collab_megatron.config.sections import BudgetSection, LLMSection
from collab_megatron.errors import RunError
from collab_megatron.rollout.journal.store import Journal, Replay, ReplayMiss
from collab_megatron.rollout.llm import Gateway, SimulatorError
from collab_megatron.rollout.llm import budget as budget_module
from collab_megatron.rollout.llm.accounting import CALLS
from collab_megatron.rollout.llm.budget import Budget
from collab_megatron.rollout.llm.role_client import RoleClient
from collab_megatron.types import CallRecord
from tests.rollout.llm.calls import GOOD, config_for, good, hello, use_role
from tests.rollout.llm.misbehaving import MisbehavingEndpoint

PRICES: dict[str, Any] = {"input_usd_per_mtoken": 10.0, "output_usd_per_mtoken": 100.0}  # 0.002 dollars an answer
SECRETS = ("sk-first-secret-0123456789", "sk-second-secret-9876543210")


class Observer:
    def __init__(self) -> None:
        self.providers: list[tuple[str, str, str]] = []
        self.kinds: list[tuple[str, str]] = []

    def provider(self, role: str, model: str, fingerprint: str, deployment: int = 0) -> None:
        self.providers.append((role, model, fingerprint))

    def malformed(self, role: str, kind: str) -> None:
        self.kinds.append((role, kind))


def journal(folder: Path, replay: Replay = "auto") -> closing[Journal]:
    return closing(Journal(folder / "journal.sqlite", replay=replay, lineage="test"))


async def five(role: RoleClient) -> tuple[list[str], list[CallRecord]]:
    calls: list[CallRecord] = []
    CALLS.set(calls)
    return [(await role.complete(hello(sample_index=index)))[0] for index in range(5)], calls


@pytest.mark.parametrize("faults", [{}, {"empty": 0.3, "wrong_role": 0.3, "huge": 0.1}])
def test_a_replay_walks_the_same_path_and_asks_nobody(tmp_path: Path, faults: dict[str, float]) -> None:
    observer = Observer()
    with MisbehavingEndpoint(lambda body: f"{GOOD} {body['seed']}", faults=faults, seed=4) as endpoint:
        config = config_for(endpoint.url, max_attempts=40, **PRICES)
        with journal(tmp_path) as book:
            (first, calls), before = use_role(config, five, journal=book, observer=observer)
            spent = book.spent()
        with journal(tmp_path, "only") as book:
            (again, replayed), after = use_role(config, five, journal=book, observer=observer)
            assert book.spent() == spent
        asked = sum(endpoint.counts.values())
    assert again == first
    assert not any(call.replayed for call in calls)
    assert all(call.replayed and call.cost_usd == 0 and call.answered_by == "m" for call in replayed)
    assert before.answers == after.replayed == asked
    assert (after.calls, after.attempts, after.answers, after.cost_usd) == (0, 0, 0, 0.0)
    assert sum(item.calls for item in spent.values()) == asked
    assert sum(item.cost_usd for item in spent.values()) == pytest.approx(0.002 * asked)
    assert observer.providers == [("user", "m", "fp-1")] * asked * 2  # what is replayed counts like what came
    assert after.malformed == before.malformed == asked - 5
    assert len(observer.kinds) == 2 * (asked - 5)
    assert (before.malformed > 0) == bool(faults)


def test_malformed_replies_of_the_journal_are_asked_again(tmp_path: Path) -> None:
    """A call that failed for its replies would else fail at every resume, without a single request."""

    async def call(role: RoleClient) -> Any:
        return (await role.complete(hello(parse=json.loads)))[0]

    async def refused(role: RoleClient) -> str:
        with pytest.raises(SimulatorError) as caught:
            await call(role)
        return str(caught.value)

    said = ["[" * 1500, "no JSON", "{"]
    with MisbehavingEndpoint(lambda body: said.pop() if said else "{}") as endpoint:
        config = config_for(endpoint.url, max_attempts=3)
        with journal(tmp_path) as book:
            words, before = use_role(config, refused, journal=book)
        assert "after 3 attempts" in words
        with journal(tmp_path, "only") as book:
            words, replayed = use_role(config, refused, journal=book)
        assert "after 3 attempts" in words
        with journal(tmp_path) as book:
            value, after = use_role(config, call, journal=book)
        assert endpoint.counts["good"] == 4
    assert value == {}
    assert (before.malformed, replayed.malformed, after.malformed) == (3, 3, 3)
    assert (before.answers, replayed.answers, after.answers) == (3, 0, 1)
    assert (after.replayed, after.calls, after.failures) == (3, 1, 0)


def test_what_the_journal_lacks_ends_a_run_that_may_ask_nothing(tmp_path: Path) -> None:
    async def miss(role: RoleClient) -> None:
        with pytest.raises(ReplayMiss, match="user") as caught:
            await role.complete(hello(sample_index=99))
        assert isinstance(caught.value, RunError)
        assert not isinstance(caught.value, SimulatorError)

    with MisbehavingEndpoint(good) as endpoint:
        with journal(tmp_path) as book:
            use_role(config_for(endpoint.url), five, journal=book)
        with journal(tmp_path, "only") as book:
            use_role(config_for(endpoint.url), miss, journal=book)
        with journal(tmp_path, "off") as book:
            use_role(config_for(endpoint.url), five, journal=book)
        assert endpoint.counts["good"] == 10


def test_another_deployment_replays_what_the_first_answered(tmp_path: Path) -> None:
    with MisbehavingEndpoint(good) as endpoint:
        with journal(tmp_path) as book:
            use_role(config_for(endpoint.url), five, journal=book)
        with journal(tmp_path, "only") as book:
            _, usage = use_role(config_for(endpoint.url, endpoint.url), five, journal=book)
    assert usage.replayed == 5


def test_an_answer_is_on_disk_before_it_is_used(tmp_path: Path) -> None:
    seen: list[int] = []

    def check(text: str) -> None:
        seen.append(sum(item.calls for item in book.spent().values()))

    with MisbehavingEndpoint(good) as endpoint, journal(tmp_path) as book:
        use_role(config_for(endpoint.url), lambda role: role.complete(hello(parse=check)), journal=book)
    assert seen == [1]


@pytest.mark.parametrize("kept", [False, True])
def test_the_budget_warns_once_and_is_exhausted_with_the_way_out(
    tmp_path: Path, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget_module, "FRESH_S", 0.0)

    async def main(url: str, section: BudgetSection, book: Journal | None) -> list[Any]:
        gateway = Gateway({"user": config_for(url, **PRICES)}, 1, journal=book, budget=section)
        said: list[Any] = []
        try:
            for index in range(4):
                await gateway.role("user").complete(hello(sample_index=index))
                said.append((gateway.budget.warnings(), gateway.budget.exhausted))
            return [*said, gateway.budget.metrics()]
        finally:
            await gateway.close()

    section = BudgetSection(soft_usd=0.003, hard_usd=0.005, hard_calls=100)
    with MisbehavingEndpoint(good) as endpoint, journal(tmp_path) as book:
        *said, metrics = asyncio.run(main(endpoint.url, section, book if kept else None))
    warned, exhausted = zip(*said, strict=True)
    assert [len(sentences) for sentences in warned] == [0, 1, 0, 0]
    assert "soft_usd" in warned[1][0]
    assert exhausted[:2] == (None, None)
    assert "budget.hard_usd" in exhausted[2]
    assert "run.resume=true" in exhausted[2]
    assert metrics["budget/usd_to_date"] == pytest.approx(0.008)
    assert metrics["budget/calls_to_date"] == 4
    assert metrics["budget/hard_share"] == pytest.approx(1.6)
    assert metrics[f"budget/user/{'m' if kept else 'hosted_vllm/m'}/calls_to_date"] == 4


def test_a_cap_on_calls_counts_earlier_processes(tmp_path: Path) -> None:
    async def exhausted(url: str, book: Journal) -> str | None:
        gateway = Gateway({"user": config_for(url)}, 1, journal=book, budget=BudgetSection(hard_calls=5))
        await gateway.close()
        return gateway.budget.exhausted

    with MisbehavingEndpoint(good) as endpoint:
        with journal(tmp_path) as book:
            use_role(config_for(endpoint.url), five, journal=book)
        with journal(tmp_path) as book:
            assert "budget.hard_calls is 5" in (asyncio.run(exhausted(endpoint.url, book)) or "")


def test_a_cap_counts_own_calls_between_two_readings_of_the_journal(tmp_path: Path) -> None:
    own = {("user", "m"): (0, 0.0)}
    with journal(tmp_path) as book:
        budget = Budget(BudgetSection(hard_calls=5), book, lambda: own)
        assert budget.exhausted is None
        own[("user", "m")] = (5, 0.0)  # answered within FRESH_S of that reading
        assert "budget.hard_calls is 5" in (budget.exhausted or "")


@pytest.mark.parametrize("provider", ["hosted_vllm", "openai"])
def test_no_key_reaches_a_log_an_error_or_the_journal(
    tmp_path: Path, endpoint: Any, provider: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIRST_KEY", SECRETS[0])
    monkeypatch.setenv("SECOND_KEY", SECRETS[1])
    told = " and ".join(SECRETS)  # a provider that quotes what it was sent
    endpoint.script = [(429, {}, told), (500, {}, told), (401, {}, told), (400, {}, told), (404, {}, told)] * 2
    endpoint.script += ["", "no JSON"]
    plain = config_for(endpoint.url, endpoint.url, provider=provider, max_attempts=2).model_dump()
    plain["api_key_env"], plain["deployments"][0]["api_key_env"] = "FIRST_KEY", "SECOND_KEY"
    said: list[str] = []

    async def body(role: RoleClient) -> None:
        for index in range(8):
            try:
                await role.complete(hello(sample_index=index, parse=json.loads))
            except SimulatorError:
                said.append(traceback.format_exc())
        said.append(repr(role._deployments.items))

    with caplog.at_level(logging.DEBUG), journal(tmp_path) as book:
        use_role(LLMSection(**plain), body, journal=book)
    assert len(said) > 3
    assert {request["authorization"] for request in endpoint.requests} == {f"Bearer {key}" for key in SECRETS}
    everything = "\n".join([*said, caplog.text, *(str(record.args) for record in caplog.records)])
    stored = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    for key in SECRETS:
        assert key not in everything
        assert key.encode() not in stored
