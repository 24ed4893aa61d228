"""Training while the next batch is sampled: two driver processes, and a real engine that is updated in between."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from collab_megatron.rollout.record_files import read_trees
from tests.conftest import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_one_step_ahead_on_two_shards(rl_command: Callable[..., list[str]], warm_run: Run, tmp_path: Path) -> None:
    ended = warm_run(
        *rl_command(
            tmp_path / "run",
            "train.steps=4",
            "driver={max_staleness: 1, shards: 2}",
            "journal.keep_all=true",
        ),
        timeout_s=280,
    )
    assert ended.code == 0, ended.output[-4000:]
    lines = (tmp_path / "run" / "tensorboard" / "rl" / "metrics.jsonl").read_text().splitlines()
    steps = [
        row for row in map(json.loads, lines) if "reward/mr_mean" in row
    ]  # the last evaluation has a row of its own
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert steps[0]["rollout/staleness_max"] == 0
    assert max(row["rollout/staleness_max"] for row in steps) == 1
    trees = list(read_trees(tmp_path / "run" / "conversations" / "rl"))
    for step in range(1, 5):
        of_step = [tree for tree in trees if tree["step"] == step]
        assert len(of_step) == 4
        versions = {version for tree in of_step for reply in tree["replies"] for version in reply["weight_versions"]}
        assert versions <= {step - 2, step - 1}
    with sqlite3.connect(tmp_path / "run" / "journal" / "rl.sqlite") as journal:
        ((delivered,),) = journal.execute("SELECT count(*) FROM deliveries")
        assert delivered == 8  # of four steps and two shards
    # TensorBoard's figures of both shards together
    assert steps[-1]["budget/calls_to_date"] > steps[0]["budget/calls_to_date"] > steps[0]["simulator/user/calls"] > 0
