"""The dry run of a job of several nodes: the map is part of the plan, and a layout that does not fit is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from collab_megatron.config import RLConfig, load_config
from collab_megatron.data.parquet import write_tasks
from collab_megatron.errors import UserError
from collab_megatron.launch.node import parse_node, several
from collab_megatron.launch.preflight import check_rl
from tests.conftest import DESK_KEY, REPOSITORY
from tests.rollout.fakes import TASK


def test_the_map_is_part_of_the_plan(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DESK_API_KEY", DESK_KEY)
    tasks = tmp_path / "tasks.parquet"
    write_tasks(tasks, [TASK])
    files = [f"data.train={tasks}", f"data.validation={tasks}", f"run.dir={tmp_path / 'run'}"]

    def load(*overrides: str) -> RLConfig:
        own = [f"model.path={tiny_model}", *files, "parallel.data=8", "driver.shards=2", *overrides]
        return load_config(RLConfig, REPOSITORY / "conf" / "demo_rl.yaml", own)

    node = several(parse_node("8x80"), 3, None)
    check_rl(load("engine.count=8"), dry_run=True, node=node)
    plan = capsys.readouterr().out
    assert "nodes       3 nodes, 24 GPUs: 16 trainer ranks, 8 servers of 1 rank, 0 idle" in plan
    assert "node1 to node2  8 GPUs  trainer 0 to 15, 8 on each" in plan
    assert "crosses nodes: data; launcher on node1, 2 drivers on node1" in plan
    with pytest.raises(
        UserError, match="16 trainer ranks and 9 engine ranks do not fit: 3 nodes have 24 GPUs"
    ) as caught:
        check_rl(load("engine.count=9"), dry_run=True, node=node)
    assert "ask for 4 nodes" in str(caught.value)
