"""A whole build in this process, with the rule-based roles of conf/mini/ called as functions: no server, no process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from collab_megatron.config import BuildDatasetConfig, load_config
from collab_megatron.data.dataset_source import load_rows
from collab_megatron.data_engine.build import BuildProgress, build_dataset
from collab_megatron.demo import mini_roles
from collab_megatron.errors import UserError
from collab_megatron.rollout.llm.accounting import GatewaySnapshot
from collab_megatron.rollout.llm.budget import Budget
from tests.demo.test_mini_tasks import MINI, Role


class Functions:
    """As Gateway, over functions."""

    def __init__(self, roles: Any, seed: int, *, journal: Any, budget: Any, go_on: str) -> None:
        self.budget = Budget(budget, journal, dict, go_on)

    def role(self, name: str) -> Role:
        return Role(f"mini-{name}")

    def part(self, name: str, sample_index: int) -> int:
        return 0

    def together(self, name: str, part: int) -> bool:
        return False

    def snapshot(self) -> GatewaySnapshot:
        return GatewaySnapshot({})

    async def check_reachable(self) -> None: ...
    async def close(self) -> None: ...


@pytest.fixture(autouse=True)
def _functions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("collab_megatron.data_engine.worker.Gateway", Functions)
    mini_roles.learn_items(MINI)
    yield
    mini_roles._ITEMS.clear()


def build(folder: Path, *overrides: str) -> BuildProgress:
    sound = [f"output={folder}", "tokenizer=null", "num_conversations=6", "reward.accuracy_verifier=judge"]
    config = load_config(BuildDatasetConfig, MINI / "math_data.yaml", [*sound, *overrides])
    return build_dataset(config, lambda progress: None)


def lines(folder: Path) -> list[str]:
    return [line for shard in sorted(folder.glob("*.jsonl")) for line in shard.read_text().splitlines()]


def test_flat_and_nested_builds_hold_the_same_rows(tmp_path: Path) -> None:
    assert build(tmp_path / "flat").complete
    assert build(tmp_path / "nested", "form=nested").complete
    nested = [json.loads(line) for line in lines(tmp_path / "nested")]
    assert sorted(row["conv_id"] for row in nested) == list(range(6))
    assert len(lines(tmp_path / "flat")) > len(nested)
    flat_rows, nested_rows = (
        sorted(load_rows(str(tmp_path / name)), key=lambda row: (row.conv_id, row.turn_id, row.completion))
        for name in ("flat", "nested")
    )
    assert flat_rows == nested_rows
    assert any(row["proactive"] for row in map(json.loads, lines(tmp_path / "flat")))


@pytest.mark.parametrize("form", ["flat", "nested"])
def test_a_torn_build_goes_on_and_other_problems_are_not_mixed(tmp_path: Path, form: str) -> None:
    build(tmp_path / "out", f"form={form}")
    before = lines(tmp_path / "out")
    shard = tmp_path / "out" / "conversations-000.jsonl"
    shard.write_text("\n".join(before[:-1]) + "\n" + before[-1][:50])
    again = build(tmp_path / "out", f"form={form}")
    assert again.before == 5
    assert again.complete
    assert sorted(lines(tmp_path / "out")) == sorted(before)  # the same seed makes the same again
    other = tmp_path / "other.jsonl"
    other.write_text((MINI / "math.jsonl").read_text().replace("garden", "park"))
    with pytest.raises(UserError, match=r"made with another problems \(contents\)"):
        build(tmp_path / "out", f"problems={other}")
    with pytest.raises(UserError, match="made with another num_proactive_candidates"):
        build(tmp_path / "out", "num_proactive_candidates=2")
