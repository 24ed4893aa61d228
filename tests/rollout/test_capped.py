"""A hard cap over several driver processes: at most one tree goes over, and what was paid for is not paid for again."""

from __future__ import annotations

from pathlib import Path

import pytest

from collab_megatron.config import RLConfig
from collab_megatron.config.sections import BudgetSection
from collab_megatron.errors import BudgetSpent
from collab_megatron.rollout.rewards import judge_calls
from collab_megatron.rollout.tree_grower import tree_calls
from tests.rollout.runs import FUTURES, REPLIES, config, counts, play, stand_in

pytestmark = pytest.mark.slow

STEPS = 2


def capped(folder: Path, url: str, calls: int) -> RLConfig:
    settings = config(folder, url, shards=2, max_staleness=1, order="completion")
    return settings.model_copy(update={"budget": BudgetSection(hard_calls=calls)})


def test_two_processes_keep_one_cap_and_a_higher_one_goes_on(tmp_path: Path) -> None:
    with stand_in(tmp_path, latency_ms=20) as url:
        settings = capped(tmp_path, url, 20)
        tree = tree_calls(settings.rollout, judge_calls(settings.reward, settings.simulators))
        assert tree == REPLIES * FUTURES * (2 + 2)  # two user turns, two judges
        for cap in (20, 50):  # without admission the eight trees of two batches begin at once: up to 128
            with pytest.raises(BudgetSpent, match=f"budget.hard_calls is {cap}: raise budget.hard_calls"):
                play(capped(tmp_path, url, cap), url, steps=STEPS)
            assert cap <= counts(url)["paid"] < cap + tree
        whole = play(capped(tmp_path, url, 100_000), url, steps=STEPS)
        assert counts(url)["repeated"] == 0
    assert [len(batch) for batch in whole.batches] == [4 * REPLIES] * STEPS
