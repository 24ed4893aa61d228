"""kill -9 of driver processes at random moments: nothing paid for twice, no tree delivered twice or lost, and the same
batches as without a kill.

With COLLAB_MEGATRON_FULL=1 the drivers of the longest test are `python -m` processes that do their own imports, killed
20 times; else they are forked ones (tests/forks.py), killed a few times.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from collab_megatron.config import RLConfig
from collab_megatron.config.sections import JudgeSection
from collab_megatron.launch import drivers
from collab_megatron.launch.drivers import driver_command
from collab_megatron.types import TrainingSample
from collab_megatron.wire import protocol
from tests.rollout import runs, weak_spots
from tests.rollout.runs import FUTURES, PROMPTS, REPLIES, Moment, Played, config, counts, lines, moments, play, stand_in

pytestmark = pytest.mark.slow

FULL = os.environ.get("COLLAB_MEGATRON_FULL") == "1"
KILLS = {0: 20, 1: 20} if FULL else {0: 3, 1: 4}
STEPS = 5 if FULL else 4
LATENCY_MS = 40.0
START_S = 4.0 if FULL else 0.6
"""About what a driver takes until it is ready."""
UNDER_WAY_S = (-0.25, 1.0)
"""From an answer's departure to the kill before its commit. The client takes about 10 ms of CPU for an answer, and a
wave of them queues for it; that the other end is gone is noticed with as much delay on a busy machine."""


@pytest.fixture(scope="module", autouse=True)
def _impatient() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "ASK_AGAIN_S", 0.5)
        patch.setattr(protocol, "SILENT_S", 60.0)
        yield


@dataclass(frozen=True)
class Run:
    """One that has ended, and where it was."""

    config: RLConfig
    url: str
    played: Played

    def replayed(self, replay: str) -> Played:
        """From step 0 once more, in the same folder."""
        journal = self.config.journal.model_copy(update={"replay": replay})
        return play(self.config.model_copy(update={"journal": journal}), self.url, steps=STEPS)


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Strictly on-policy, and never killed."""
    folder = tmp_path_factory.mktemp("left_alone")
    with stand_in(folder, latency_ms=LATENCY_MS) as url:
        settings = config(folder, url)
        run = Run(settings, url, play(settings, url, steps=STEPS))
        assert [len(batch) for batch in run.played.batches] == [PROMPTS * REPLIES] * STEPS
        assert counts(url)["repeated"] == counts(url)["turns_repeated"] == 0
        yield run


@pytest.fixture(scope="module", params=[0, pytest.param(1, marks=pytest.mark.full)], ids=["staleness0", "staleness1"])
def killed(request: pytest.FixtureRequest, left_alone: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("killed")
    staleness = request.param
    with stand_in(folder, latency_ms=LATENCY_MS) as url:
        settings = config(folder, url, max_staleness=staleness)
        when = moments(KILLS[staleness], paid=left_alone.played.paid, start_s=START_S, seed=11 + staleness)
        run = Run(settings, url, play(settings, url, steps=STEPS, kills=when, warm=not FULL))
        assert len(run.played.kills) == KILLS[staleness]
        yield run


def test_the_batches_are_those_of_a_driver_left_alone(killed: Run, left_alone: Run) -> None:
    """The stand-in's words do not depend on the weights, so the versions alone may differ, within the staleness."""
    stale = killed.config.driver.max_staleness
    for step, batch in enumerate(killed.played.batches):
        assert all(step - stale <= version <= step for sample in batch for version in sample.versions_T)
    if stale:
        assert contents(killed.played) == contents(left_alone.played)
    else:
        assert killed.played.batches == left_alone.played.batches
    assert killed.played.evaluations == left_alone.played.evaluations


def test_each_tree_is_written_once(killed: Run, left_alone: Run) -> None:
    exact = killed.config.driver.max_staleness == 0
    found = lines(killed.config.run.dir, versions=exact)
    assert found == lines(left_alone.config.run.dir, versions=exact)
    assert Counter(line["step"] for line in found) == dict.fromkeys(range(1, STEPS + 1), PROMPTS)
    assert all(len(reply["futures"]) == FUTURES for line in found for reply in line["replies"])


def test_no_reply_that_was_kept_is_paid_for_again(killed: Run) -> None:
    """What had not arrived, or not yet been committed when the driver was killed, is asked for once more."""
    asked = counts(killed.url)
    held, given = runs.committed(killed.config)
    assert held == given  # none was kept twice
    assert asked["paid"] - asked["repeated"] >= held
    lost = asked["paid"] - given
    assert asked["repeated"] <= lost
    require_near_a_kill(killed.url, killed.played)


def test_a_replay_asks_nobody_and_gives_the_same_batches(killed: Run) -> None:
    before = counts(killed.url)
    file = killed.config.run.conversations_dir / "shard0.jsonl"
    written, as_before = file.read_bytes(), lines(killed.config.run.dir)
    assert killed.replayed("only").batches == killed.played.batches
    assert (counts(killed.url), file.read_bytes()) == (before, written)
    if not killed.config.driver.max_staleness:
        runs.forget_deliveries(killed.config)
        assert killed.replayed("only").batches == killed.played.batches  # made of single turns and replies
        assert counts(killed.url) == before
        assert lines(killed.config.run.dir) == as_before  # but for the times
        written = file.read_bytes()
    assert killed.replayed("auto").batches == killed.played.batches
    after = counts(killed.url)
    assert file.read_bytes() == written
    # with staleness the trees beyond the last batch go on
    for name in ("repeated", "turns_repeated") if killed.config.driver.max_staleness else before:
        assert after[name] == before[name]


def test_a_driver_that_dies_while_it_delivers(tmp_path: Path, left_alone: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """At points that a random moment seldom meets: nothing is asked for again, and no line is lost or written twice."""
    (tmp_path / "died").mkdir()

    def command(resolved: Path, max_context_tokens: int) -> list[str]:
        python, m, _, *rest = driver_command(resolved, max_context_tokens)
        return [python, m, "tests.rollout.weak_spots", str(tmp_path / "died"), *rest]

    monkeypatch.setattr(drivers, "driver_command", command)
    with stand_in(tmp_path, latency_ms=LATENCY_MS) as url:
        settings = config(tmp_path, url)
        played = play(settings, url, steps=STEPS)
        asked = counts(url)
    assert len(list((tmp_path / "died").iterdir())) == weak_spots.SPOTS
    assert played.batches == left_alone.played.batches
    assert lines(tmp_path) == lines(left_alone.config.run.dir)
    assert asked["repeated"] == asked["turns_repeated"] == 0


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    with stand_in(tmp_path, latency_ms=LATENCY_MS) as url:
        yield url


def test_of_two_shards_one_is_killed(tmp_path: Path, url: str, left_alone: Run) -> None:
    """The trainer sees one stream: that of one driver."""
    settings = config(tmp_path, url, shards=2, max_staleness=1)
    when = moments(2, paid=left_alone.played.paid, start_s=0.6, seed=3)
    played = play(settings, url, steps=STEPS, kills=when, victim=1)
    assert len(played.kills) == 2
    assert contents(played) == contents(left_alone.played)
    ours, theirs = (lines(folder, versions=False) for folder in (tmp_path, left_alone.config.run.dir))
    assert sorted(map(str, ours)) == sorted(map(str, theirs))
    held, given = runs.committed(settings)
    assert held == given
    require_near_a_kill(url, played)


def test_trees_that_leave_as_they_end_and_are_replaced(tmp_path: Path, url: str, left_alone: Run) -> None:
    """Which trees make a batch depends on the time; that none is delivered twice or left behind does not."""
    settings = config(
        tmp_path, url, max_staleness=1, order="completion", oversample_prompts=2, refill_groups=2, min_group_std=0.3
    )
    when = moments(4, paid=left_alone.played.paid, start_s=0.6, seed=5)
    played = play(settings, url, steps=STEPS, kills=when)
    assert len(played.kills) == 4
    batches = runs.delivered(settings)
    seats = Counter((of, slot) for trees in batches.values() for of, slot, _ in trees)
    assert set(seats.values()) == {1}
    assert any(replaced for trees in batches.values() for _, _, replaced in trees)
    assert all(sum(not replaced for _, _, replaced in batches[step]) >= PROMPTS for step in range(STEPS))
    # a tree has its replies one step after its own at the latest, and leaves one step later
    assert {(step, slot) for step in range(STEPS - 2) for slot in range(PROMPTS)} <= set(seats)
    written = Counter(line["step"] for line in lines(tmp_path))
    assert written == {step + 1: len(trees) for step, trees in batches.items()}
    held, given = runs.committed(settings)
    assert held == given
    assert Run(settings, url, played).replayed("only").batches == played.batches


def test_rounds_of_futures_with_tree_credit_and_a_second_judge(tmp_path: Path, url: str) -> None:
    """Which futures a tree plays depends on rewards: after a kill the journal leads to the same ones."""

    def settings(name: str, url: str) -> RLConfig:
        base = config(tmp_path / name, url, min_group_std=0.0)
        second = JudgeSection(model="hosted_vllm/judge", api_base=f"{url}/v1", api_key_env=None)
        return base.model_copy(
            update={
                "rollout": base.rollout.model_copy(update={"num_repeat_rollouts": "auto"}),
                "algorithm": base.algorithm.model_copy(update={"credit": "tree"}),
                "reward": base.reward.model_copy(update={"second_judge": second, "second_judge_share": 0.3}),
            }
        )

    (tmp_path / "alone").mkdir()
    (tmp_path / "killed").mkdir()
    with stand_in(tmp_path / "alone", latency_ms=LATENCY_MS) as other:
        alone = play(settings("alone", other), other, steps=2)
    when = [Moment(alone.paid // 4, 0.02), Moment(alone.paid // 2, 0.02)]
    killed = settings("killed", url)
    played = play(killed, url, steps=2, kills=when)
    assert len(played.kills) == 2
    assert played.batches == alone.batches
    assert lines(tmp_path / "killed") == lines(tmp_path / "alone")
    futures = [len(reply["futures"]) for line in lines(tmp_path / "killed") for reply in line["replies"]]
    assert min(futures) == 2 < max(futures)
    assert len(played.batches[0]) >= 3 * PROMPTS * REPLIES  # most of them later turns
    held, given = runs.committed(killed)
    assert held == given


def contents(played: Played) -> list[list[tuple[Any, ...]]]:
    """Every batch without its versions, in an order that does not depend on shards."""

    def content(sample: TrainingSample) -> tuple[Any, ...]:
        return sample.prompt_ids, sample.reply_ids_T, sample.rollout_logprobs_T, sample.advantage

    return [sorted(map(content, batch)) for batch in played.batches]


def require_near_a_kill(url: str, played: Played) -> None:
    """Of every answer that did not reach the journal."""
    low, high = UNDER_WAY_S
    gaps = [min((kill - sent_at for kill in played.kills), key=abs) for sent_at, _ in counts(url)["repeats"]]
    assert all(low <= gap <= high for gap in gaps), gaps
