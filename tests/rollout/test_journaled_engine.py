"""Turns from the journal, and the queue in front of the engines."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from collab_megatron.limiter import AdaptiveLimiter
from collab_megatron.rollout.journal.store import Journal, ReplayMiss
from collab_megatron.rollout.journaled_engine import JournaledEngine, turn_key
from collab_megatron.types import Generation
from tests.rollout.fakes import ScriptedEngine, generation


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with closing(Journal(tmp_path / "journal.sqlite", replay="auto", lineage="x")) as opened:
        yield opened


async def ask(engine: JournaledEngine, name: str = "0/0", ids: tuple[int, ...] = (1, 2)) -> list[Generation]:
    return await engine.generate(ids, n=1, temperature=1.0, max_new_tokens=4, name=name)


async def test_a_turn_is_sampled_once(journal: Journal) -> None:
    below = ScriptedEngine(["a", "b", "c"])
    first = await ask(JournaledEngine(below, journal, AdaptiveLimiter(100), max_staleness=0))
    engine = JournaledEngine(below, journal, AdaptiveLimiter(100), max_staleness=0)
    assert await ask(engine) == first
    assert engine.replayed == 1
    assert len(below.contexts) == 1
    assert await ask(engine, name="0/1") != first  # the same context in another tree is another draw
    assert await ask(engine, ids=(1, 3)) != first


async def test_turns_of_weights_that_are_too_old_are_sampled_anew(journal: Journal) -> None:
    below = ScriptedEngine(["a", "b", "c"])
    engine = JournaledEngine(below, journal, AdaptiveLimiter(100), max_staleness=1)
    first = await ask(engine)  # by version 0
    await engine.trainer_at(1, 1)
    assert await ask(engine) == first
    await engine.trainer_at(2, 2)
    assert await ask(engine) != first


@pytest.mark.parametrize("version", [-1, 3])
async def test_without_a_trainer_the_lineage_alone_says_whose_turns_they_are(tmp_path: Path, version: int) -> None:
    """Servers that nobody publishes to name no version (-1), or one of the run that they came from."""
    below = ScriptedEngine(["a", "b", "c"])
    turns = []
    for lineage in ("x", "x", "y"):
        with closing(Journal(tmp_path / "journal.sqlite", replay="auto", lineage=lineage)) as journal:
            engine = JournaledEngine(Versioned(below, version), journal, AdaptiveLimiter(100), max_staleness=None)
            turns.append(await ask(engine))
    assert turns[0] == turns[1] != turns[2]
    assert len(below.contexts) == 2


@dataclass
class Versioned:
    """Answers as `below`, under a weight version of its own."""

    below: ScriptedEngine
    version: int

    async def generate(self, input_ids: Sequence[int], **how: Any) -> list[Generation]:
        turns = await self.below.generate(input_ids, **how)
        return [replace(turn, versions_T=(self.version,) * len(turn.versions_T)) for turn in turns]


async def test_a_turn_of_weights_that_will_come_again_is_waited_for(journal: Journal) -> None:
    """The run had reached version 1 when it was killed; resumed at version 0, the turn is taken once 1 is live."""
    recorded = [generation("later", version=1)]
    journal.record_turn(turn_key("0/0", (1, 2), n=1, temperature=1.0, max_new_tokens=4), recorded)
    below = ScriptedEngine(["a"])
    engine = JournaledEngine(below, journal, AdaptiveLimiter(100), max_staleness=1)
    await engine.trainer_at(0, 1)
    waiting = asyncio.create_task(ask(engine))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await engine.trainer_at(1, 1)
    assert await asyncio.wait_for(waiting, timeout=5) == recorded
    assert below.contexts == []
    fresh = JournaledEngine(below, journal, AdaptiveLimiter(100), max_staleness=1)  # no earlier attempt
    await fresh.trainer_at(0, 0)
    assert await ask(fresh) != recorded


async def test_replay_only_samples_nothing(tmp_path: Path, journal: Journal) -> None:
    below = ScriptedEngine(["a"])
    await ask(JournaledEngine(below, journal, AdaptiveLimiter(100), max_staleness=0))
    with closing(Journal(tmp_path / "journal.sqlite", replay="only", lineage="x")) as strict:
        engine = JournaledEngine(below, strict, AdaptiveLimiter(100), max_staleness=0)
        await ask(engine)
        with pytest.raises(ReplayMiss):
            await ask(engine, name="0/1")
    assert len(below.contexts) == 1


async def test_tokens_in_flight_are_bounded(journal: Journal) -> None:
    class Holding(ScriptedEngine):
        most = now = 0

        async def generate(self, *args: object, **more: object) -> list[Generation]:
            self.now += 1
            self.most = max(self.most, self.now)
            await asyncio.sleep(0.01)
            self.now -= 1
            return [generation("a")]

    below = Holding([])
    engine = JournaledEngine(below, journal, AdaptiveLimiter(100), max_staleness=0)
    await asyncio.gather(*(ask(engine, name=f"{i}", ids=tuple(range(40))) for i in range(9)))  # 44 tokens each
    assert below.most == 2
