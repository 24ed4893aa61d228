"""A hard cap is kept: what work in progress may still cost is reserved before other work starts, in all processes."""

from __future__ import annotations

import asyncio
import math
import os
import random
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from collab_megatron.config.sections import BudgetSection
from collab_megatron.errors import BudgetSpent
from collab_megatron.rollout.journal import reservations
from collab_megatron.rollout.journal.store import Journal, Spent
from collab_megatron.rollout.llm import Gateway, SimulatorError
from collab_megatron.rollout.llm import budget as budget_module
from collab_megatron.rollout.llm.budget import Budget, Reservation, note_answer
from collab_megatron.types import LLMReply
from tests.rollout.llm.calls import config_for, good, hello
from tests.rollout.llm.misbehaving import MisbehavingEndpoint


class World:
    """A budget without a journal, and what was answered."""

    def __init__(self, **caps: float) -> None:
        self.calls, self.usd = 0, 0.0
        section = BudgetSection.model_validate(caps)
        self.budget = Budget(section, None, lambda: {("user", "m"): (self.calls, self.usd)})

    def answer(self, work: Reservation, usd: float = 0.0) -> None:
        with work.spending():
            note_answer(usd)
        self.calls, self.usd = self.calls + 1, self.usd + usd


@pytest.mark.parametrize("seed", range(20))
def test_at_most_one_piece_of_work_goes_over_the_cap_and_all_of_it_is_used(seed: int) -> None:
    """Pieces of random length and price, begun and answered in random order."""
    rng = random.Random(seed)
    most, cap = rng.randint(1, 40), rng.randint(1, 300)
    dollars = seed % 2 == 1
    world = World(**({"hard_usd": cap * 0.125} if dollars else {"hard_calls": cap}))
    under_way: dict[Reservation, int] = {}
    while world.budget.exhausted is None or under_way:
        if (rng.random() < 0.7 or not under_way) and (work := world.budget.reserve(most)) is not None:
            under_way[work] = rng.randint(0, most)
        assert under_way or world.budget.exhausted, "nothing may begin, and the cap is not reached"
        if under_way:
            work = rng.choice(list(under_way))
            if under_way[work] == 0:
                del under_way[work]
                work.release()
            else:
                under_way[work] -= 1
                world.answer(work, 0.125)
    assert cap <= world.calls < cap + most


def test_a_cap_in_dollars_lets_one_piece_run_alone_until_a_price_is_known() -> None:
    world = World(hard_usd=10.0)
    first = world.budget.reserve(4)
    assert first is not None
    assert world.budget.reserve(4) is None
    world.answer(first, 0.5)
    assert world.budget.reserve(4) is None  # a single answer may be of the cheapest role
    for _ in range(3):
        world.answer(first, 1.5)
    first.release()
    others = [world.budget.reserve(4) for _ in range(4)]  # 5.0 are spent, and each may cost 5.0
    assert [other is not None for other in others] == [True, False, False, False]


def test_without_a_cap_everything_begins() -> None:
    world = World(soft_calls=1)
    work = [world.budget.reserve(100) for _ in range(100)]
    assert None not in work


def test_who_waits_for_room_begins_when_other_work_ends_and_learns_of_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget_module, "POLL_S", math.inf)  # what frees room must wake who waits

    async def main() -> list[str]:
        world, log = World(hard_calls=3), []

        async def piece(name: str) -> None:
            try:
                async with world.budget.room(2):
                    log.append(f"{name} begins")
                    await asyncio.sleep(0)
                    note_answer(0.0)
                    world.calls += 1
                log.append(f"{name} ends")
            except BudgetSpent as spent:
                log.append(f"{name}: {spent}")

        await asyncio.gather(*(piece(name) for name in "abcd"))
        return log

    log = asyncio.run(asyncio.wait_for(main(), 10))
    assert log[:2] == ["a begins", "b begins"]
    assert log[2:5] == ["a ends", "b ends", "c begins"]
    assert log[-1].startswith("d: the LLM APIs have answered 3 requests, and budget.hard_calls is 3: raise")


def test_processes_see_what_the_others_set_aside_until_they_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section, nothing = BudgetSection(hard_calls=10), dict[tuple[str, str], tuple[int, float]]
    path = tmp_path / "journal.sqlite"
    other = subprocess.Popen(["sleep", "60"])
    try:
        with (
            closing(Journal(path, replay="auto", lineage="")) as mine,
            closing(Journal(path, replay="auto", lineage="")) as theirs,
        ):
            here, there = Budget(section, mine, nothing), Budget(section, theirs, nothing)
            with monkeypatch.context() as patch:
                patch.setattr(reservations.os, "getpid", lambda: other.pid)
                assert there.reserve(9) is not None
            first = here.reserve(4)
            assert first is not None  # 9 of 10 are set aside: the last piece may pass the cap
            assert here.reserve(4) is None
            mine.record_reply(b"k", "user", LLMReply(("a",), 1, 1, 0.0, 0.1, "m"))
            first.release()
            assert here.reserve(4) is None  # 1 was spent, 9 are set aside
            other.kill()
            other.wait(10)
            assert here.reserve(4) is not None  # what a dead process held is free again
            assert mine._execute("SELECT pid, calls FROM reserved").fetchall() == [(os.getpid(), 4)]
            assert mine.spent() == {("user", "m"): Spent(1, 0.0)}
    finally:
        other.kill()
        other.wait(10)


@pytest.mark.parametrize("caps", [{"hard_calls": 6}, {"hard_usd": 0.012}])
def test_replies_that_are_asked_for_again_end_at_one_more_piece(caps: dict[str, float]) -> None:
    """A provider whose every reply is malformed: the pieces cost eight times what was set aside for them."""

    async def main(url: str) -> list[str]:
        section = config_for(url, max_attempts=8, input_usd_per_mtoken=10.0, output_usd_per_mtoken=100.0)
        gateway = Gateway({"user": section}, 1, budget=BudgetSection.model_validate(caps))
        ends: list[str] = []

        async def piece(index: int) -> None:
            try:
                async with gateway.budget.room(2):
                    for turn in range(2):
                        try:
                            await gateway.role("user").complete(hello(sample_index=2 * index + turn, parse=refuse))
                        except SimulatorError:
                            ends.append("failed")
            except BudgetSpent as spent:
                ends.append(str(spent))

        await asyncio.gather(*(piece(index) for index in range(12)))
        await gateway.close()
        return ends

    def refuse(text: str) -> None:
        raise ValueError("no")

    with MisbehavingEndpoint(good) as endpoint:
        ends = asyncio.run(main(endpoint.url))
        asked = sum(endpoint.counts.values())
    assert 6 <= asked <= 6 + 16  # the last piece that began, with all its attempts
    assert any("raise budget.hard_" in end for end in ends)
