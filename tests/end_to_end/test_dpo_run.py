"""train_dpo as a user runs it: it learns the pairs, a resumed run equals one that was never stopped; online DPO."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from collab_megatron.data.parquet import Pair, write_pairs
from collab_megatron.trainer.report.dashboard import read_metrics
from collab_megatron.types import Message
from tests.conftest import Ended, Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

OPENINGS = ("hi", "a table for 4 please", "a room on monday", "a taxi at noon", "a table at noon")


def pairs(path: Path, *openings: str) -> Path:
    better, worse = (Message("assistant", "which time and day?"),), (Message("assistant", "a table for 4"),)
    write_pairs(path, [Pair(o, (Message("user", o),), better, worse) for o in openings])
    return path


def test_a_resumed_run_equals_one_that_was_never_stopped(warm_run: Run, tiny_model: Path, tmp_path: Path) -> None:
    """Bit for bit, with the reference that the first attempt had."""
    train = pairs(tmp_path / "train.parquet", *OPENINGS[:4])
    held_out = pairs(tmp_path / "held_out.parquet", OPENINGS[4])

    def dpo(name: str, steps: int, *overrides: str) -> Ended:
        ended = warm_run(
            *("-m", "collab_megatron.train_dpo", "conf/demo_dpo.yaml", f"run.dir={tmp_path / 'run'}"),
            *(f"run.name={name}", f"model.path={tiny_model}", f"data.train={train}", f"data.validation={held_out}"),
            *("parallel.tensor=1", f"train.steps={steps}", "train.eval_interval=3", "train.keep_best=false"),
            *("batch_size=3", "optimizer={lr: 0.001, schedule: constant, warmup_steps: 0}", "max_tokens=64"),
            *(f"export_hf={tmp_path / f'{name}-{steps}'}", *overrides),
        )
        assert ended.code == 0, ended.output[-4000:]
        return ended

    said = dpo("whole", 6).output
    assert "training    6 steps of 3 pairs" in said
    assert "whole: 4 pairs, 1 held out, 4.5 epochs" in said
    dpo("stopped", 3)
    dpo("stopped", 6, "run.resume=true")
    whole, resumed = (load_file(tmp_path / f"{name}-6" / "model.safetensors") for name in ("whole", "stopped"))
    assert whole.keys() == resumed.keys()
    assert all(whole[name].equal(resumed[name]) for name in whole)

    rows = {int(row["step"]): row for row in read_metrics(tmp_path / "run/tensorboard/whole") if "train/loss" in row}
    again = {int(row["step"]): row for row in read_metrics(tmp_path / "run/tensorboard/stopped") if "train/loss" in row}
    figures = ("train/loss", "train/pair_accuracy", "train/reward_margin", "train/chosen_logprob", "train/grad_norm")
    assert [[rows[step][name] for name in figures] for step in range(1, 7)] == [
        [again[step][name] for name in figures] for step in range(1, 7)
    ]
    assert rows[1]["train/reward_margin"] == pytest.approx(0, abs=1e-5)  # policy and reference are equal
    assert rows[1]["train/loss"] == pytest.approx(0.6931, abs=1e-4)
    assert rows[6]["train/pair_accuracy"] == 1
    assert rows[6]["train/reward_margin"] > 0.1
    held = {int(row["step"]): row for row in read_metrics(tmp_path / "run/tensorboard/whole") if "eval/loss" in row}
    assert sorted(held) == [0, 3, 6]
    assert held[6]["eval/loss"] < held[0]["eval/loss"] == pytest.approx(0.6931, abs=1e-4)
    assert held[6]["eval/pair_accuracy"] == 1


def test_online_dpo_trains_on_the_drivers_groups(
    warm_run: Run, rl_command: Callable[..., list[str]], tmp_path: Path
) -> None:
    ended = warm_run(*rl_command(tmp_path / "run", "online_dpo={beta: 0.2}", "train.steps=2"))
    assert ended.code == 0, ended.output[-6000:]
    rows = [row for row in read_metrics(tmp_path / "run" / "tensorboard" / "rl") if "rollout/pairs" in row]
    assert [int(row["step"]) for row in rows] == [1, 2]
    trained = [row for row in rows if row["rollout/pairs"]]
    assert trained, "no group of two steps had a pair"
    for row in trained:
        assert row["rollout/samples"] == 2 * row["rollout/pairs"]
        assert 0 <= row["train/pair_accuracy"] <= 1
        assert row["train/chosen_logprob"] < 0
        assert row["train/on_policy_gap"] < 0.01
    # nothing is trained without a pair, so whichever step is the first to have one begins with the reference's weights
    assert trained[0]["train/loss"] == pytest.approx(0.6931, abs=1e-3)
    assert all(row["train/loss"] != pytest.approx(0.6931, abs=1e-6) for row in trained[1:])
