"""The whole road of a paper's task in its miniature: real servers, ranks, LiteLLM and endpoint, one command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from collab_megatron.data.parquet import read_pairs, read_tasks
from tests.conftest import REPOSITORY

ROAD_S = 900.0
METRICS = {"math": "accuracy", "medium": "bleu_score", "bigcodebench": "pass_rate"}
# not every machine of the tests can isolate programs, and this model has seen 42 harmless ones only
UNSAFE = {"bigcodebench": ("reward.settings.pass_rate.sandbox=unsafe",)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "task", [pytest.param("medium"), *(pytest.param(task, marks=pytest.mark.full) for task in ("math", "bigcodebench"))]
)
def test_a_miniature_goes_the_whole_road(task: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = [sys.executable, "tools/mini_task.py", task, *UNSAFE.get(task, ()), "--run-dir", str(run_dir)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=ROAD_S, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for kind in ("sft", "dpo"):
        assert (run_dir / f"{kind}_hf" / "model.safetensors").exists()
    figures = json.loads((run_dir / "evaluation.json").read_text())
    assert figures["conversations"] == len(read_tasks(run_dir / "data" / "rl_validation.parquet")[:8])
    assert figures["conversations_failed"] == 0
    assert 0.0 <= figures[METRICS[task]] <= 1.0
    assert -1.0 <= figures["mr"] <= 2.0
    assert read_pairs(run_dir / "data" / "dpo_train.parquet")
    steps = [json.loads(line) for line in (run_dir / "tensorboard" / "rl" / "metrics.jsonl").read_text().splitlines()]
    assert any("reward/mr_mean" in step for step in steps)
