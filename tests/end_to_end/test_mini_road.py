"""The whole road of a paper's task in its miniature: real servers, ranks, LiteLLM and endpoint, one command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from collab_megatron.data.parquet import read_pairs, read_tasks
from collab_megatron.rollout.record_files import read_trees
from tests.conftest import Run

ROAD_S = 900.0
FAILED, SUCCEEDED = 0.1, 0.9
METRICS = {"math": "accuracy", "medium": "bleu_score", "bigcodebench": "pass_rate"}
# not every machine of the tests can isolate programs, and this model has seen 42 harmless ones only
UNSAFE = {"bigcodebench": ("reward.settings.pass_rate.sandbox=unsafe",)}


def require_both_ends(metric: str, run_dir: Path) -> None:
    """The metric told good conversations from bad ones, in those of the dataset and those of RL, and noted why."""
    rows = [json.loads(line) for file in (run_dir / "multiturn").glob("*.jsonl") for line in file.open()]
    built = [score for row in rows for score in row["rewards"][metric]]
    assert min(built) < FAILED
    assert max(built) > SUCCEEDED  # mini-assistant solves an item whose details it was told
    trees = list(read_trees(run_dir / "conversations" / "rl"))
    futures = [future for tree in trees for reply in tree["replies"] for future in reply["futures"]]
    scored = [future for future in futures if future["reward"] is not None]
    assert scored
    assert all(future["details"][metric] for future in scored)
    assert all(0.0 <= future["scores"][metric] <= 1.0 for future in scored)
    if metric == "bleu_score":  # a document of the small model is partly right
        assert len({future["scores"][metric] for future in scored}) > 2


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.timeout(ROAD_S + 30)
@pytest.mark.parametrize("task", METRICS)
def test_a_miniature_goes_the_whole_road(task: str, warm_run: Run, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = ("tools/mini_task.py", task, *UNSAFE.get(task, ()), "--run-dir", str(run_dir))
    ended = warm_run(*command, timeout_s=ROAD_S)
    assert ended.code == 0, ended.output[-6000:]
    for kind in ("sft", "dpo"):
        assert (run_dir / f"{kind}_hf" / "model.safetensors").exists()
    figures = json.loads((run_dir / "evaluation.json").read_text())
    assert figures["conversations"] == len(read_tasks(run_dir / "data" / "rl_validation.parquet")[:8])
    assert figures["conversations_failed"] == 0
    assert -1.0 <= figures["mr"] <= 2.0
    require_both_ends(METRICS[task], run_dir)
    assert read_pairs(run_dir / "data" / "dpo_train.parquet")
    steps = [json.loads(line) for line in (run_dir / "tensorboard" / "rl" / "metrics.jsonl").read_text().splitlines()]
    assert any("reward/mr_mean" in step for step in steps)
