"""A hard cap ends a run with its own exit code and a checkpoint, within one tree's calls of the cap; a higher one
lets it go on to its end."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from collab_megatron.rollout.journal.store import Journal
from collab_megatron.rollout.record_files import read_trees
from collab_megatron.trainer.report.dashboard import read_metrics
from collab_megatron.wire.checkpoints import newest_complete, read_info
from tests.conftest import DESK_KEY, Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def answered_calls(run_dir: Path) -> int:
    with closing(Journal(run_dir / "journal" / "rl.sqlite", replay="auto", lineage="")) as journal:
        return sum(spent.calls for spent in journal.spent().values())


def test_a_spent_budget_ends_with_three_and_a_higher_one_goes_on(
    rl_command: Callable[..., list[str]], warm_run: Run, tmp_path: Path
) -> None:
    # a step is 4 trees, each of 8 conversations with two user turns and one judge at most: the cap lets the first step
    # be finished, whatever its users say, and cuts a later one
    tree = 8 * 3
    cap = 4 * tree
    asked = rl_command(tmp_path, "train.steps=3", "train.save_interval=0", "driver.shards=2")
    ended = warm_run(*asked, f"budget.hard_calls={cap}")
    assert ended.code == 3, ended.output[-4000:]
    (error,) = ended.errors
    calls = answered_calls(tmp_path)
    assert cap <= calls < cap + tree
    said = re.search(rf"the LLM APIs have answered (\d+) requests, and budget.hard_calls is {cap}:", error)
    assert said is not None, error
    assert cap <= int(said[1]) <= calls  # the other process ends the tree that it had begun
    assert "raise budget.hard_calls and start the same command again, training with run.resume=true, to go on" in error
    assert "Traceback" not in ended.output
    newest = newest_complete(tmp_path / "checkpoints" / "rl")
    assert newest is not None
    saved = read_info(newest).step  # because of the cap: none was due before the end
    assert saved in (1, 2)

    resumed = warm_run(*asked, "budget.hard_calls=100000", "run.resume=true")
    assert resumed.code == 0, resumed.output[-4000:]
    newest = newest_complete(tmp_path / "checkpoints" / "rl")
    assert newest is not None
    assert read_info(newest).step == 3
    rows = [row for row in read_metrics(tmp_path / "tensorboard" / "rl") if "time_s/step" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    spent = [row["budget/calls_to_date"] for row in rows]
    assert spent[saved - 1] <= calls < spent[-1]  # of both attempts together
    trees = list(read_trees(tmp_path / "conversations" / "rl"))
    assert sorted(tree["step"] for tree in trees) == [step for step in (1, 2, 3) for _ in range(4)]
    assert DESK_KEY not in ended.output + resumed.output
