"""Equal requests at temperature 0 are answered once, and nothing that was paid for is lost with a checkpoint."""

from __future__ import annotations

import asyncio
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from collab_megatron.config.sections import JudgeSection, LLMSection
from collab_megatron.rollout.journal.store import Journal
from collab_megatron.rollout.llm import SimulatorError
from collab_megatron.rollout.llm.accounting import CALLS
from collab_megatron.rollout.llm.equal_requests import EqualRequests
from collab_megatron.rollout.llm.role_client import RoleClient
from collab_megatron.rollout.llm.role_journal import RoleJournal
from collab_megatron.run_order import POSITION, RunPosition
from collab_megatron.types import CallRecord, LLMReply
from tests.rollout.llm.calls import GOOD, config_for, good, hello, use_role
from tests.rollout.llm.misbehaving import MisbehavingEndpoint

KEY = b"k" * 16
PRICES: dict[str, Any] = {"input_usd_per_mtoken": 10.0, "output_usd_per_mtoken": 100.0}


def judge(url: str, **changes: Any) -> LLMSection:
    return config_for(url, **{"temperature": 0.0, "answer_once": True, **PRICES, **changes})


async def at_once(role: RoleClient) -> tuple[list[str], list[CallRecord]]:
    """Five calls that differ in their sample index alone."""
    calls: list[CallRecord] = []
    CALLS.set(calls)
    answers = await asyncio.gather(*(role.complete(hello(sample_index=index)) for index in range(5)))
    return [text for (text,) in answers], calls


def test_judges_share_answers_and_users_do_not() -> None:
    assert JudgeSection(model="m").answer_once
    assert not LLMSection(model="m").answer_once


def test_five_equal_requests_are_one(tmp_path: Path) -> None:
    with (
        MisbehavingEndpoint(good, delay_s=0.05) as endpoint,
        closing(Journal(tmp_path / "j.sqlite", replay="auto", lineage="t")) as book,
    ):
        (texts, calls), usage = use_role(judge(endpoint.url), at_once, journal=book)
        assert len(endpoint.requests) == 1
        assert [spent.calls for spent in book.spent().values()] == [1]
        (again, _), usage_again = use_role(judge(endpoint.url), at_once, journal=book)  # another process
        assert len(endpoint.requests) == 1
    assert texts == again == [GOOD] * 5
    assert (usage.answers, usage.shared) == (1, 4)
    assert (usage_again.answers, usage_again.replayed, usage_again.shared) == (0, 1, 4)
    assert sorted(call.shared for call in calls) == [False] + [True] * 4
    assert sum(call.cost_usd for call in calls) == pytest.approx(usage.cost_usd)
    assert usage.cost_usd > 0
    assert all(call.requests == 0 and call.prompt_tokens == 0 for call in calls if call.shared)


@pytest.mark.parametrize("apart", [{"temperature": 0.5}, {"answer_once": False}])
def test_requests_that_may_have_several_answers_stay_apart(apart: dict[str, Any]) -> None:
    with MisbehavingEndpoint(good) as endpoint:
        _, usage = use_role(judge(endpoint.url, **apart), at_once)
        assert len({body["seed"] for body in endpoint.requests}) == 5
    assert (usage.answers, usage.shared) == (5, 0)


@pytest.mark.slow
def test_a_call_that_fails_does_not_fail_those_that_wait_for_it() -> None:
    # its answer comes after the change of faults, however busy the machine is
    with MisbehavingEndpoint(good, faults={"500": 1.0}, delay_s=0.5) as endpoint:

        async def body(role: RoleClient) -> list[Any]:
            first = asyncio.create_task(role.complete(hello()))
            await asyncio.sleep(0)
            others = [asyncio.create_task(role.complete(hello(sample_index=i))) for i in (1, 2)]
            while not endpoint.counts["500"]:  # noqa: ASYNC110 - the endpoint is another thread
                await asyncio.sleep(0.01)
            endpoint.faults = {}
            return await asyncio.gather(first, *others, return_exceptions=True)

        results, usage = use_role(judge(endpoint.url, max_attempts=1), body)
    assert isinstance(results[0], SimulatorError)
    assert results[1:] == [[GOOD], [GOOD]]
    assert usage.failures == 1


def test_a_cancelled_call_does_not_leave_the_others_waiting() -> None:
    with MisbehavingEndpoint(good, delay_s=0.2) as endpoint:

        async def body(role: RoleClient) -> list[str]:
            first = asyncio.create_task(role.complete(hello()))
            await asyncio.sleep(0.05)
            other = asyncio.create_task(role.complete(hello(sample_index=1)))
            await asyncio.sleep(0)
            first.cancel()
            return await asyncio.wait_for(other, 5)

        answer, _ = use_role(judge(endpoint.url), body)
    assert answer == [GOOD]


def test_a_malformed_answer_is_asked_for_again_at_a_higher_temperature() -> None:
    answers = iter(["bad"] + ["7"] * 9)

    def number(text: str) -> int:
        return int(text)

    with MisbehavingEndpoint(lambda body: next(answers)) as endpoint:

        async def body(role: RoleClient) -> list[list[int]]:
            return [await role.complete(hello(parse=number, sample_index=index)) for index in range(2)]

        results, usage = use_role(judge(endpoint.url), body)
        temperatures = [request["temperature"] for request in endpoint.requests]
    assert results == [[7], [7]]
    assert temperatures[:2] == [0.0, 0.5]
    assert usage.unreadable == 2  # the shared answer was looked at twice


async def test_an_answer_that_is_used_again_stays_in_the_journal_as_long_as_its_newest_step(tmp_path: Path) -> None:
    with closing(Journal(tmp_path / "j.sqlite", replay="auto", lineage="t")) as book:
        of_role = RoleJournal(book, "judge", "m")
        equal = EqualRequests(of_role)
        POSITION.set(RunPosition(3))
        paid = LLMReply((GOOD,), 10, 2, 0.5, model="m")
        of_role.keep(KEY, paid)
        equal.keep(KEY, paid)
        await _pruned(book, before_step=4)
        assert book.reply(KEY) is None  # a checkpoint has made step 3 obsolete
        POSITION.set(RunPosition(9))
        shared = await equal.answer(KEY)
        assert shared is not None
        assert (shared.texts, shared.cost_usd, shared.shared) == ((GOOD,), 0.0, True)
        await _pruned(book, before_step=8)
        assert of_role.find(KEY) is not None  # a resume at step 8 does not pay again
        POSITION.set(RunPosition(5))  # an older tree uses it too: the newest step counts
        await equal.answer(KEY)
        await EqualRequests(of_role).answer(KEY)
        EqualRequests(of_role).keep(KEY, of_role.find(KEY) or paid)
        await _pruned(book, before_step=9)
        assert of_role.find(KEY) is not None
        assert [(spent.calls, spent.cost_usd) for spent in book.spent().values()] == [(1, 0.5)]


async def test_memory_is_bounded() -> None:
    equal = EqualRequests(None, most=2)
    for number in range(3):
        equal.keep(bytes([number]), LLMReply((str(number),), 1, 1, 0.0))
    assert await equal.answer(b"\0") is None
    assert await equal.answer(b"\2") is not None


async def _pruned(book: Journal, *, before_step: int) -> None:
    """Waits until the journal's thread has removed the steps: deliveries are the last of its tables."""
    book.record_delivery(0, before_step - 1, b"")
    book.prune(before_step=before_step)
    async with asyncio.timeout(10):
        while book.delivered(0, before_step - 1) is not None:  # noqa: ASYNC110 - another thread
            await asyncio.sleep(0.02)
