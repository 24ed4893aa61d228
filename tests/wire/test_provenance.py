"""What a run says when it goes on from a checkpoint that another config, or other packages, made."""

from __future__ import annotations

import copy
from typing import Any

from collab_megatron.config import RLConfig
from collab_megatron.config.sections import DataSection, ModelSection, SimulatorsSection, UserSection
from collab_megatron.config.sections.llm import JudgeSection
from collab_megatron.wire.provenance import data_position, decisive_differences, differences, package_versions

ROWS = 32


def config() -> dict[str, Any]:
    made = RLConfig(
        model=ModelSection(path="/models/a"),
        data=DataSection(train="train.parquet"),
        simulators=SimulatorsSection(user=UserSection(model="gpt-4o-mini"), judge=JudgeSection(model="gpt-4o-mini")),
    )
    return made.model_dump(mode="json")


def saved(step: int = 4) -> dict[str, Any]:
    return {"config": config(), "data": data_position(seed=1, steps=step, rows_per_step=ROWS)}


def test_nothing_is_said_of_the_same_run() -> None:
    now = config()
    now["run"]["resume"] = True
    assert differences(saved(), now, package_versions(), ROWS, 4) == []


def test_a_line_for_every_key_that_differs() -> None:
    now = copy.deepcopy(config())
    now["optimizer"]["lr"] = 2e-6
    now["run"]["seed"] = 2
    now["simulators"]["judge"] = None
    lines = differences(saved(), now, {}, ROWS, 4)
    assert "optimizer.lr: 1e-06 -> 2e-06" in lines
    assert "run.seed: 1 -> 2 (another data order: rows of this epoch may be used twice or never)" in lines
    assert "simulators.judge: (absent) -> None" in lines
    assert "simulators.judge.model: gpt-4o-mini -> (absent)" in lines


def test_another_batch_size_moves_the_place_in_the_data() -> None:
    assert differences(saved(), config(), {}, 2 * ROWS, 4) == [
        "data: 128 rows were used; this run continues at row 256 of the data order"
    ]


def test_other_packages_are_named() -> None:
    versions = {**package_versions(), "torch": "2.0.0", "left-out": "1"}
    here = package_versions()["torch"]
    assert differences(saved(), config(), versions, ROWS, 4) == [
        "left-out (version): 1 -> (absent)",
        f"torch (version): 2.0.0 -> {here}",
    ]
    assert differences(saved(), config(), {}, ROWS, 4) == []  # format 1 does not say them


def test_what_decides_the_weights_makes_another_run() -> None:
    same = copy.deepcopy(config())
    same["run"] |= {"resume": "auto", "dir": "/elsewhere"}
    same["train"] |= {"steps": 500, "save_interval": 3}
    same["parallel"]["tensor"] = 2
    same["engine"]["count"] = 4
    same["driver"]["group_timeout_s"] = 7.0
    same["simulators"]["user"] |= {"timeout_s": 1.0, "api_base": "http://elsewhere"}
    same["optimizer"]["distributed"] = True
    del same["algorithm"]["clip_dual"]  # a version that did not know it
    assert decisive_differences(saved(), same) == []
    other = copy.deepcopy(config())
    other["optimizer"]["lr"] = 2e-6
    other["simulators"]["user"] |= {"model": "another", "extra": {"top_p": 0.5}}
    other["data"]["train"] = "other.parquet"
    other["reward"]["metric_weights"]["bleu"] = 1.0
    other["online_dpo"] = {"beta": 0.1, "min_gap": 0.0}
    assert decisive_differences(saved(), other) == [
        "data.train: train.parquet -> other.parquet",
        "online_dpo.beta: (absent) -> 0.1",
        "online_dpo.min_gap: (absent) -> 0.0",
        "optimizer.lr: 1e-06 -> 2e-06",
        "reward.metric_weights.bleu: (absent) -> 1.0",
        "simulators.user.extra.top_p: (absent) -> 0.5",
        "simulators.user.model: gpt-4o-mini -> another",
    ]
