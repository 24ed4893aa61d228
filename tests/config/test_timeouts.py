"""Deadlines that lie inside each other are checked when a config is loaded; both keys and values are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from collab_megatron.config import BuildDatasetConfig, EvaluateConfig, RLConfig, SFTConfig, load_config
from collab_megatron.errors import UserError

BASE = ["model.path=m", "data.train=t.parquet", "data.validation=v.parquet"]
LLMS = ["simulators.user.model=a", "simulators.judge.model=b"]


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    path = tmp_path / "empty.yaml"
    path.write_text("{}\n")
    return path


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["driver.group_timeout_s=599"], "driver.group_timeout_s=599 must be at least driver.future_timeout_s=600"),
        (["simulators.user.deadline_s=600"], "driver.future_timeout_s=600 must be longer than simulators.user.deadl"),
        (["simulators.judge.timeout_s=241"], "simulators.judge.deadline_s=240 must be at least simulators.judge.time"),
        (["simulators.user.mixture=[{model: c, deadline_s: 700}]"], "longer than simulators.user.mixture.0.deadline_s"),
        (["reward.judges={accuracy: {model: c, deadline_s: 700}}"], "longer than reward.judges.accuracy.deadline_s=7"),
        (["engine.health_timeout_s=600"], "driver.future_timeout_s=600 must be longer than engine.health_timeout_s=60"),
        (["evaluation.timeout_s=30"], "evaluation.timeout_s=30 must be longer than simulators.user.deadline_s=240"),
        (["sync.timeout_s=10"], "sync.timeout_s=10 must be longer than run.stopped_timeout_s=20"),
        (["parallel.collective_timeout_s=20"], "parallel.collective_timeout_s=20 must be longer than run.stopped_tim"),
    ],
)
def test_a_pair_the_wrong_way_round_is_the_users_mistake(empty: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config(RLConfig, empty, [*BASE, *LLMS, *overrides])
    assert said in str(refused.value)
    assert str(refused.value).endswith(": raise the first or lower the second")


def test_what_is_not_waited_for_is_not_compared(empty: Path) -> None:
    load_config(RLConfig, empty, [*BASE[:2], *LLMS, "evaluation.timeout_s=30", "train.eval_interval=0"])


def test_the_other_entry_points_check_what_they_have(empty: Path) -> None:
    with pytest.raises(UserError, match=r"parallel\.collective_timeout_s=5 must be longer than run\.stopped_timeout_s"):
        load_config(SFTConfig, empty, [*BASE[:2], "parallel.collective_timeout_s=5"])
    with pytest.raises(UserError, match=r"evaluation\.timeout_s=60 must be longer than simulators\.user\.deadline_s=2"):
        load_config(EvaluateConfig, empty, [*BASE, *LLMS, "evaluation.timeout_s=60"])
    build = ["problems=p", "output=o", "simulators.assistant={model: c, deadline_s: 5}"]
    with pytest.raises(
        UserError, match=r"simulators\.assistant\.deadline_s=5 must be at least simulators\.assistant\.ti"
    ):
        load_config(BuildDatasetConfig, empty, [*build, *LLMS])


def test_derived_deadlines_enclose_what_they_are_derived_from(empty: Path) -> None:
    config = load_config(RLConfig, empty, [*BASE, *LLMS])
    assert (config.driver.request_timeout_s, config.driver.step_timeout_s) == (900, 1800)
    assert config.engine.wait_s == 900
    assert [config.engine.work_timeout_on(device) for device in ("cuda", "cpu")] == [20, 120]
    slow = ["driver.future_timeout_s=6000", "driver.group_timeout_s=7000", "engine.startup_timeout_s=4000"]
    config = load_config(RLConfig, empty, [*BASE, *LLMS, *slow])
    assert config.driver.future_timeout_s < config.driver.request_timeout_s < config.driver.step_timeout_s
    assert config.driver.group_timeout_s < config.driver.step_timeout_s
    assert config.engine.startup_timeout_s < config.engine.wait_s


REMOVED = [
    ("engine.wait_s=5", "it is 3 times engine.startup_timeout_s"),
    ("engine.work_timeout_s=5", "engine.health_timeout_s"),
    ("engine.request_timeout_s=5", "it is 1.5 times driver.future_timeout_s"),
    ("rollout.step_timeout_s=5", "driver.group_timeout_s"),
    ("simulators.user.json_mode=false", "for false write response_format: text"),
]


@pytest.mark.parametrize("override, said", REMOVED)
def test_a_removed_key_names_what_took_its_place(empty: Path, override: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config(RLConfig, empty, [*BASE, *LLMS, override])
    key = override.partition("=")[0]
    assert str(refused.value).startswith(f"{empty}: the key {key!r} was removed: ")
    assert said in str(refused.value)
