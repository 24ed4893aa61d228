"""collect with real drivers against the stand-in: killed drivers, an interrupted command, a spent budget.

tests/end_to_end/test_collect_and_replay.py runs the command against a real engine.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from collab_megatron import collect
from collab_megatron.config import RLConfig
from collab_megatron.config.sections import BudgetSection, EngineSection, ReplaySection
from collab_megatron.errors import BudgetSpent, NoEngineLeft, UserError
from collab_megatron.launch.lock import run_lock
from collab_megatron.rollout.record_files import read_trees, whole_steps
from collab_megatron.wire import protocol
from collab_megatron.wire.roster import EngineEntry, RosterFolder
from tests.forks import ForkingSupervisor
from tests.rollout.runs import DRIVERS, MAX_CONTEXT_TOKENS, PROMPTS, config, counts, lines, stand_in

pytestmark = pytest.mark.slow

STEPS = 3


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with stand_in(tmp_path_factory.mktemp("stand_in"), latency_ms=20.0) as url:
        yield url


@pytest.fixture(autouse=True)
def forked_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "Supervisor", lambda folder, **_: ForkingSupervisor(DRIVERS, folder))
    monkeypatch.setattr(protocol, "ASK_AGAIN_S", 0.5)
    monkeypatch.setattr(protocol, "POLL_S", 0.05)


def given(folder: Path, url: str, *, steps: int = STEPS, **changed: Any) -> RLConfig:
    """Also of the processes that a run leaves: the record is read under the name `run`."""
    whole = config(folder, url, order="completion", **changed)
    whole = whole.model_copy(update={"engine": EngineSection(urls=(url,))})
    own = collect.to_collect(whole, steps)
    return own.model_copy(update={"run": own.run.model_copy(update={"name": "run"})})


def grow(own: RLConfig) -> None:
    with run_lock(own.run) as lock:
        collect.grow(own, whole_steps(own.run.conversations_dir, own.driver.shards), MAX_CONTEXT_TOKENS, lock)


def in_steps(own: RLConfig) -> list[tuple[int, int]]:
    return [(tree["step"], tree["begun_for_step"]) for tree in read_trees(own.run.conversations_dir)]


def disturb(patch: pytest.MonkeyPatch, how: Callable[[collect.Drivers], None], url: str, paid: int) -> list[int]:
    """`how` is done to the drivers once, as soon as `paid` replies were paid for; the returned list then has one."""
    done: list[int] = []

    class Watched(collect.Drivers):
        def poll(self) -> None:
            super().poll()
            if not done and (now := counts(url)["paid"]) >= paid:
                done.append(now)
                how(self)

    patch.setattr(collect, "Drivers", Watched)
    return done


def test_steps_are_whole_although_the_weights_never_change(tmp_path: Path, url: str) -> None:
    """Of two processes. To training, replies of version 0 would be too old for step 3, and trees of step 4 would be
    under way at the end (driver.max_staleness)."""
    own = given(tmp_path, url, max_staleness=1, shards=2)
    grow(own)
    trees = list(read_trees(own.run.conversations_dir))
    assert [tree["step"] for tree in trees] == [step for step in range(1, STEPS + 1) for _ in range(PROMPTS)]
    assert len({tree["task_id"] for tree in trees}) == len(trees)
    assert {tuple(reply["weight_versions"]) for tree in trees for reply in tree["replies"]} == {(0,)}
    assert all(tree["begun_for_step"] == tree["step"] for tree in trees)
    assert all(tree["kept"] for tree in trees)
    (step, *_, total) = [line.split() for line in collect.table(own.run.conversations_dir)[1:]]
    rewards = [reply["mr"] for tree in trees for reply in tree["replies"]]
    assert (step[0], step[1], total[0], total[1]) == ("1", str(PROMPTS), "all", str(PROMPTS * STEPS))
    assert float(total[2]) == pytest.approx(sum(rewards) / len(rewards), abs=6e-4)


def test_killed_drivers_and_an_interrupted_command_lose_nothing_and_pay_nothing_twice(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = given(tmp_path / "alone", url)
    before = counts(url)["paid"]
    grow(alone)
    paid = counts(url)["paid"] - before
    each = paid // STEPS

    def kill(drivers: collect.Drivers) -> None:
        os.kill(drivers.children[0].process.pid, signal.SIGKILL)

    def interrupt(_: collect.Drivers) -> None:
        raise KeyboardInterrupt

    with stand_in(tmp_path / "again", latency_ms=20.0) as another:  # counts for itself
        own = given(tmp_path / "disturbed", another)
        with monkeypatch.context() as patch:
            killed = disturb(patch, kill, another, each // 2)
            grow(own.model_copy(update={"train": own.train.model_copy(update={"steps": 2})}))
        assert killed
        assert killed[0] < each, "the first step was over"
        assert whole_steps(own.run.conversations_dir, 1) == 2
        with monkeypatch.context() as patch:
            disturb(patch, interrupt, another, 2 * each + each // 2)
            with pytest.raises(KeyboardInterrupt):
                grow(own)
        assert whole_steps(own.run.conversations_dir, 1) == 2
        grow(own)
        figures = counts(another)
        assert lines(own.run.dir) == lines(alone.run.dir)
        assert figures["paid"] - figures["repeated"] == paid
        # an answer that is on its way when a process ends is paid for and not seen: twice a few here, more on a busy
        # machine, and never half a step
        assert figures["repeated"] < each // 2
        grow(own)  # nothing is left
        assert counts(another)["paid"] == figures["paid"]


def test_a_spent_budget_ends_it_and_a_larger_one_goes_on(tmp_path: Path, url: str) -> None:
    own = given(tmp_path, url)
    with pytest.raises(BudgetSpent, match=r"budget.hard_calls is 40"):
        grow(own.model_copy(update={"budget": BudgetSection(hard_calls=40)}))
    done = whole_steps(own.run.conversations_dir, 1)
    assert done < STEPS
    grow(own)
    assert sorted({step for step, _ in in_steps(own)}) == [1, 2, 3]


def test_what_the_user_gets_wrong(tmp_path: Path, url: str) -> None:
    own = given(tmp_path, url)
    replay = own.model_copy(update={"replay": ReplaySection(record=tmp_path)})
    with pytest.raises(UserError, match="does not know replay: set replay=null"):
        collect.to_collect(replay, 1)
    folder = own.run.logs_dir / "latest"
    folder.mkdir(parents=True)
    (folder / "resolved.yaml").write_text(collect.show_config(own))
    collect.refuse_other_config(own.model_copy(update={"budget": BudgetSection(hard_calls=1)}))
    other = own.model_copy(update={"rollout": own.rollout.model_copy(update={"num_replies": 7})})
    with pytest.raises(UserError, match=r"trees of another config \(rollout.num_replies: 2 -> 7\): choose another"):
        collect.refuse_other_config(other)
    journal = own.journal.model_copy(update={"path": tmp_path / "other.sqlite"})
    with pytest.raises(UserError, match="serve other weights"):
        collect.refuse_other_config(own.model_copy(update={"journal": journal}))


def test_a_server_that_is_given_up_is_used_again_once_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roster = RosterFolder(tmp_path)
    first = EngineEntry("engine-0", "http://127.0.0.1:1", 1)
    again = EngineEntry("engine-0", "http://127.0.0.1:2", 1, life=1)
    engines, failure = collect.Engines(roster, wait_s=60.0), NoEngineLeft("no engine is left")
    roster.publish([first], 0)
    assert engines.urls() == [first.url]
    engines.give_up({first.url: "it hangs"})
    assert engines.urls() == []
    roster.publish([], 1)
    engines.wait(failure)
    roster.publish([again], 0)
    assert engines.urls() == [again.url]
    engines.used()
    roster.publish([], 0)
    with pytest.raises(NoEngineLeft, match="no engine is left"):
        engines.wait(failure)
