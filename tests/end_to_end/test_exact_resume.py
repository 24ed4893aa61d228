"""A whole RL run that was killed and went on equals, bit for bit, one that was not."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from collab_megatron.rollout.record_files import read_trees
from collab_megatron.trainer.report.dashboard import read_metrics
from collab_megatron.wire.checkpoints import newest_complete
from tests.conftest import Run
from tests.end_to_end.running import Running
from tests.rollout.runs import MOMENTARY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
STEPS = 4
SAVED = 2
EXACT = (
    "train/loss",
    "train/kl",
    "train/entropy",
    "train/grad_norm",
    "reward/mr_mean",
    "advantage/std",
    "train/tokens",
)


def test_a_killed_run_equals_one_that_was_not(
    rl_command: Callable[..., list[str]], start: Callable[..., Running], warm_run: Run, tmp_path: Path
) -> None:
    """The second run samples nothing and asks nobody: it has the first one's journal. A rank is killed after a step
    that is in no checkpoint, then the launcher gets TERM; the same command goes on."""
    settings = [f"train.steps={STEPS}", f"train.save_interval={SAVED}", "run.resume=auto"]
    whole, again = tmp_path / "whole", tmp_path / "again"
    first = warm_run(*rl_command(whole, *settings))
    assert first.code == 0, first.output[-4000:]
    (again / "journal").mkdir(parents=True)
    shutil.copy(whole / "journal" / "rl.sqlite", again / "journal" / "rl.sqlite")
    command = rl_command(again, *settings, "journal.replay=only")
    running = start(command, warm=True)
    running.wait_until(f"rl {SAVED + 1}/{STEPS}")
    os.kill(running.rank(1).pid, signal.SIGKILL)
    running.wait_until(f"all trainer ranks start again at step {SAVED + 1}")
    running.wait_until("resuming from ")
    running.send(signal.SIGTERM)
    assert running.end().code == 130
    ended = warm_run(*command)
    assert ended.code == 0, ended.output[-4000:]
    assert f"rl {STEPS}/{STEPS}" in ended.output

    assert [tree_of(tree) for tree in read_trees(again / "conversations" / "rl")] == [
        tree_of(tree) for tree in read_trees(whole / "conversations" / "rl")
    ]
    rows = [
        [row for row in read_metrics(folder / "tensorboard" / "rl") if "train/loss" in row] for folder in (whole, again)
    ]
    assert [row["step"] for row in rows[1]] == list(range(1, STEPS + 1))
    assert [[row[name] for name in EXACT] for row in rows[0]] == [[row[name] for name in EXACT] for row in rows[1]]
    models = [exported(warm_run, folder) for folder in (whole, again)]
    assert models[0].keys() == models[1].keys()
    assert all(models[0][name].equal(models[1][name]) for name in models[0])


def tree_of(tree: dict[str, Any]) -> Any:
    """The tree without what another attempt may have differently: when and how a text was had."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: kept(one) for name, one in value.items() if name not in MOMENTARY}
        return [kept(one) for one in value] if isinstance(value, list) else value

    return kept(tree)


def exported(run: Run, folder: Path) -> dict[str, Any]:
    """The tensors of the newest checkpoint, by their Hugging Face names."""
    newest = newest_complete(folder / "checkpoints" / "rl")
    ended = run(
        *("tools/convert_checkpoint.py", "megatron-to-hf", "--checkpoint", str(newest), "--output", str(folder / "hf"))
    )
    assert ended.code == 0, ended.output
    return dict(load_file(folder / "hf" / "model.safetensors"))
