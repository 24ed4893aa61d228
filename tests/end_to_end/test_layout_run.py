"""RL on a layout and with options that the demo does not use, against the real engine: the proof of each sync holds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from collab_megatron.wire.checkpoints import newest_complete, read_info
from tests.conftest import Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_pipeline_packed_rows_swapped_reference_background_saves_and_traces(
    rl_command: Callable[..., list[str]], warm_run: Run, tmp_path: Path
) -> None:
    ended = warm_run(
        *rl_command(tmp_path / "run", "train.steps=2", "parallel.tensor=1", "parallel.pipeline=2"),
        "rollout.temperature=1.3",  # of engine, trainer and reference, or the gap shows it
        *("train.packing=true", "train.recompute=full", "algorithm.reference=swap", "train.async_save=true"),
        "profile={steps: [2], ranks: [1]}",
    )
    assert ended.code == 0, ended.output[-4000:]
    lines = (tmp_path / "run" / "tensorboard" / "rl" / "metrics.jsonl").read_text().splitlines()
    gaps = [row["train/logprob_gap"] for row in map(json.loads, lines) if "train/logprob_gap" in row]
    assert len(gaps) == 2
    assert max(gaps) < 1e-3  # the second step's replies came from weights gathered over both stages
    newest = newest_complete(tmp_path / "run" / "checkpoints" / "rl")
    assert newest is not None
    assert read_info(newest).step == 2
    traces = sorted(path.name for path in (tmp_path / "run" / "logs" / "rl" / "latest" / "profile").iterdir())
    assert len(traces) == 2
    assert re.fullmatch(r"step-2\.engine-0-.*-TP-0\.trace\.json\.gz", traces[0])
    assert traces[1] == "step-2.trainer-1.json.gz"
