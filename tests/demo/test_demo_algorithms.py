"""The table of the demo's algorithms: what is run, what is counted, what is not run again. No stage runs here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from collab_megatron.config import RLConfig, load_config
from collab_megatron.demo import algorithms
from collab_megatron.demo.algorithms import ALGORITHMS, COMMON, calls_by_step, means, run_algorithms
from collab_megatron.demo.pipeline import DemoPipeline, DemoSettings
from collab_megatron.errors import UserError
from tests.conftest import REPOSITORY


class Stages:
    """Stands for DemoPipeline.stage and start_endpoint: writes what a stage leaves, and remembers the commands."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran: list[tuple[str, list[str]]] = []
        stages = self

        def stage(pipeline: DemoPipeline, name: str, argv: Sequence[str]) -> None:
            stages.ran.append((name, list(argv)))
            pipeline.wall_s[name] = 60.0
            given = dict(argument.split("=", 1) for argument in argv if "=" in argument)
            if name in ALGORITHMS:
                leave_run(Path(given["run.dir"]), name)

        monkeypatch.setattr(DemoPipeline, "stage", stage)
        monkeypatch.setattr(DemoPipeline, "start_endpoint", lambda pipeline, supervisor: None)

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.ran]


def leave_run(folder: Path, name: str) -> None:
    """Figures of two steps and of an evaluation, as train_rl writes them."""
    held_out = {"accuracy": 0.9, "clarify_rate_ambiguous": 1.0, "clarify_rate_complete": 0.1, "mr": 1.8}
    held_out |= {"users/bare/accuracy": 0.8, "users/unseen/accuracy": 0.25}
    files: dict[Path, list[dict[str, Any]]] = {
        folder / "evaluations" / f"{name}.jsonl": [
            {"step": 0, **held_out, "mr": 0.1},
            {"step": 1, **held_out, "mr": 1.75},
            {"step": 2, **held_out},
        ],
        folder / "tensorboard" / name / "metrics.jsonl": [
            {"step": 1, "simulator/user/calls": 10, "simulator/judge/calls": 5, "simulator/user/requests": 99},
            {"step": 2, "simulator/user/calls": 7, "simulator/judge/calls": 1},
            {"step": 2, "time_s/save": 3.0},
            {"step": 2, "simulator/user/calls": 7, "simulator/judge/calls": 1, "train/kl": 0.1},
            {"step": 2, "eval/simulator/user/calls": 1000},
        ],
    }
    for file, rows in files.items():
        file.parent.mkdir(parents=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(tmp_path: Path, **given: Any) -> list[dict[str, Any]]:
    wanted: dict[str, Any] = {"algorithms": ["grpo", "gspo"], "seeds": [1, 2]} | given
    return run_algorithms(DemoSettings(tmp_path), REPOSITORY, **wanted)


def test_each_seed_has_a_model_of_its_own_and_each_algorithm_a_run_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = Stages(monkeypatch)
    rows = run(tmp_path)
    one_seed = ["model", "tasks", "data", "data", "data", "sft", "grpo", "gspo"]
    assert stages.names == one_seed * 2
    assert [(row["algorithm"], row["seed"]) for row in rows] == [("grpo", 1), ("gspo", 1), ("grpo", 2), ("gspo", 2)]
    command = stages.ran[-1][1]
    assert {f"model.path={tmp_path / 'seed_2' / 'sft_hf'}", "run.seed=2", "algorithm=gspo"} <= set(command)
    assert f"run.dir={tmp_path / 'seed_2' / 'algorithms' / 'gspo'}" in command
    assert rows[0] == {
        "algorithm": "grpo",
        "seed": 1,
        "accuracy": 0.9,
        "asks if unclear": 1.0,
        "asks if clear": 0.1,
        "bare answers": 0.8,
        "unseen user": 0.25,
        "API calls to MR 1.75": 15,  # of the first step
        "API calls": 23,  # of the two steps; neither the row that a checkpoint wrote early nor the evaluation counts
        "seconds": 60.0,
    }
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["rows"] == rows
    assert [row["seeds"] for row in table["means"]] == [2, 2]


def test_what_is_finished_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run(tmp_path) if Stages(monkeypatch) else []
    again = Stages(monkeypatch)
    assert run(tmp_path, algorithms=["grpo", "gspo", "rloo"], seeds=[1])[:2] == before[:2]
    assert again.names == ["rloo"]


def test_the_folder_of_a_broken_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Stages(monkeypatch)
    run(tmp_path, seeds=[1], algorithms=["grpo"])
    broken = tmp_path / "seed_1" / "algorithms" / "gspo"
    (broken / "logs").mkdir(parents=True)
    with pytest.raises(UserError, match="is not empty: remove it"):
        run(tmp_path, seeds=[1])
    (tmp_path / "seed_1" / "sft.json").unlink()
    with pytest.raises(UserError, match="did not finish: remove the folder"):
        run(tmp_path, seeds=[1])


def test_means_and_ranges() -> None:
    row: dict[str, Any] = dict.fromkeys(algorithms.COLUMNS, 1.0)
    rows: list[dict[str, Any]] = [
        {**row, "algorithm": "grpo", "seed": 1, "unseen user": None, "accuracy": 0.5},
        {**row, "algorithm": "grpo", "seed": 2, "unseen user": 0.25, "accuracy": 0.75},
    ]
    (found,) = means(rows)
    assert found["accuracy"] == {"mean": 0.625, "min": 0.5, "max": 0.75}
    assert found["unseen user"] == {"mean": 0.25, "min": 0.25, "max": 0.25}
    assert means([rows[0]])[0]["unseen user"] is None
    assert calls_by_step([]) == {}


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_every_algorithm_is_sound_on_the_demos_config(name: str) -> None:
    config = load_config(RLConfig, REPOSITORY / "conf" / "demo_rl.yaml", [*COMMON, *ALGORITHMS[name]])
    changed = {
        "online_dpo": config.online_dpo is not None,
        "tree_credit": config.algorithm.credit == "tree",
        "grpo_apart": config.rollout.equal_replies == "apart"
        and not (config.simulators.judge and config.simulators.judge.answer_once),
    }
    assert [other for other, is_so in changed.items() if is_so] == ([name] if name in changed else [])
    if name not in changed:
        assert config.algorithm.preset == name
    # the same for all; with two mini-batches, clips do something
    assert (config.algorithm.kl_coef, config.algorithm.mini_batches) == (0.005, 2)
