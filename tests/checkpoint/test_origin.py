"""What a run says when it goes on from a checkpoint that another config, or other packages, made."""

from __future__ import annotations

import copy
from typing import Any

from collab_megatron.checkpoint.origin import data_position, differences, package_versions
from collab_megatron.config import RLConfig
from collab_megatron.config.sections import DataSection, ModelSection, SimulatorsSection, UserSection

ROWS = 32


def config() -> dict[str, Any]:
    llm = UserSection(model="gpt-4o-mini")
    made = RLConfig(
        model=ModelSection(path="/models/a"),
        data=DataSection(train="train.parquet"),
        simulators=SimulatorsSection(user=llm, judge=llm),
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
    assert "run.seed: 1 -> 2 (another data order: rows of this epoch may come twice or not at all)" in lines
    assert "simulators.judge: (absent) -> None" in lines
    assert "simulators.judge.model: gpt-4o-mini -> (absent)" in lines


def test_another_batch_size_moves_the_place_in_the_data() -> None:
    assert differences(saved(), config(), {}, 2 * ROWS, 4) == [
        "data: 128 rows were used; this run goes on at row 256 of the order"
    ]


def test_other_packages_are_named() -> None:
    versions = {**package_versions(), "torch": "2.0.0", "left-out": "1"}
    here = package_versions()["torch"]
    assert differences(saved(), config(), versions, ROWS, 4) == [
        "left-out (version): 1 -> (absent)",
        f"torch (version): 2.0.0 -> {here}",
    ]
    assert differences(saved(), config(), {}, ROWS, 4) == []  # format 1 does not say them
