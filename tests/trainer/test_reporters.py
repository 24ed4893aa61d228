"""Reports of steps and evaluations: terminal lines, rows of figures, warnings."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html

from collab_megatron.config import RLConfig, SFTConfig
from collab_megatron.json_lines import read_rows
from collab_megatron.trainer.actor.actor import StepResult
from collab_megatron.trainer.rank_batch import RankBatch
from collab_megatron.trainer.report.dashboard import read_metrics
from collab_megatron.trainer.rl_reporter import RLReporter
from collab_megatron.trainer.supervised.data import StepBatch
from collab_megatron.trainer.supervised.held_out import HeldOutLoss
from collab_megatron.trainer.supervised.reporter import SupervisedReporter
from collab_megatron.trainer.supervised.sft import SFTObjective
from collab_megatron.trainer.sync.publisher import SyncReport
from collab_megatron.types import ShownTree

SECONDS = {"time_s/logprobs": 1.0, "time_s/update": 2.0, "time_s/step": 5.0}


@pytest.fixture
def rl(tmp_path: Path) -> RLConfig:
    return RLConfig.model_validate(
        {
            "run": {"dir": tmp_path, "name": "demo"},
            "model": {"path": "m"},
            "data": {"train": "t", "validation": "v"},
            "simulators": {"user": {"model": "u"}, "judge": {"model": "j"}},
            "train": {"steps": 5},
        }
    )


def test_an_rl_step_is_a_row_a_line_and_a_warning(
    rl: RLConfig, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    reporter = RLReporter(rl, first_step=0)
    rollout = {"reward/mr_mean": 0.5, "rollout/cut_share": 0.9, "rollout/clarify_rate": 0.25}
    update = {"train/tokens": 100.0, "train/kl": 0.125, "train/model_tflop": 6.0}
    reporter.step(1, rollout, update, SyncReport(engines=2), SECONDS)
    reporter.close()
    (row,) = read_metrics(rl.run.tensorboard_dir)
    assert (row["step"], row["train/tokens_per_s"], row["sync/engines"], row["time_s/step"]) == (1, 50, 2, 5)
    assert row["train/tflop_per_s_per_rank"] == 2  # 6 in the three seconds of logprobs and update
    assert ("train/mfu" in row) == torch.cuda.is_available()
    assert 0 < row["system/host_memory_share"] < 1
    assert "demo 1/5 | reward 0.50 | asks 0.25 | kl 0.12" in capsys.readouterr().out
    assert "step 1: 90% of the replies are cut at the token limit" in caplog.text


def test_the_best_median_and_worst_tree_of_a_step_are_pages_of_text(rl: RLConfig) -> None:
    reporter = RLReporter(rl, first_step=0)
    # a policy can write Markdown and HTML: nothing of it may be read as such
    trees = [
        ShownTree(1.0, "task a\n```\n<script>alert(1)</script>"),
        ShownTree(0.5, "task b"),
        ShownTree(0.1, "task c"),
    ]
    metrics = {"reward/mr_mean": 0.5}, {"train/tokens": 1.0}
    for done, shown in ((1, trees), (2, trees[:1]), (3, [])):
        reporter.step(done, *metrics, SyncReport(engines=2), SECONDS, shown=shown)
    reporter.close()
    events = EventAccumulator(str(rl.run.tensorboard_dir)).Reload()
    pages = {tag: [tensor.step for tensor in events.Tensors(tag)] for tag in events.Tags()["tensors"]}
    steps = {name: pages[f"trees/{name}/text_summary"] for name in ("best", "median", "worst")}
    assert steps == {"best": [1, 2], "median": [1], "worst": [1]}
    text = events.Tensors("trees/best/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == "    task a\n    ```\n    <script>alert(1)</script>"
    assert markdown_to_safe_html(text) == (
        "<pre><code>task a\n```\n&lt;script&gt;alert(1)&lt;/script&gt;\n</code></pre>"
    )


def test_an_rl_evaluation_is_a_row_of_its_own_file(rl: RLConfig, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = RLReporter(rl, first_step=0)
    reporter.evaluation(2, {"mr": 0.75, "conversations": 8.0, "wall_s": 3.0})
    reporter.close()
    assert read_rows(rl.run.evaluations_file).rows == [{"step": 2, "mr": 0.75, "conversations": 8.0, "wall_s": 3.0}]
    assert read_metrics(rl.run.tensorboard_dir)[0]["eval/mr"] == 0.75
    assert "held-out after step 2: mr 0.750 (8 conversations)" in capsys.readouterr().out


def sft(folder: Path, steps: int) -> SupervisedReporter:
    config = SFTConfig.model_validate(
        {
            "run": {"dir": folder, "name": "sft"},
            "model": {"path": "m"},
            "data": {"train": "t"},
            "train": {"steps": steps},
            "batch_size": 4,
        }
    )
    objective = SFTObjective.__new__(SFTObjective)
    objective.data = cast(Any, _Data())
    return SupervisedReporter(config, first_step=0, objective=objective)


class _Data:
    noun = "conversations"
    num_held_out, left_out, share_left_out = 2, 1, 0.125
    notices = ("1 conversation was left out",)

    def __len__(self) -> int:
        return 8


def test_a_supervised_run_has_a_head_a_row_a_step_and_its_held_out_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reporter = sft(tmp_path, steps=3)
    result = StepResult(1.5, 1e-3, {"loss": 0.5, "entropy": 1.0}, skipped=False)
    for done in (1, 2, 3):
        reporter.step(done, result, StepBatch(RankBatch([], imbalance=1.25), 4, 100), SECONDS)
    reporter.evaluation(3, HeldOutLoss(math.log(2), 30, 2), best=True, seconds=0.5)
    reporter.close()
    rows = read_metrics(tmp_path / "tensorboard" / "sft")
    assert [row["step"] for row in rows] == [1, 2, 3, 3]
    assert (rows[0]["train/tokens_per_s"], rows[0]["train/dp_imbalance"], rows[0]["train/loss"]) == (50, 1.25, 0.5)
    assert rows[0]["data/conversations_left_out"] == 1
    assert rows[3]["eval/perplexity"] == pytest.approx(2)
    assert rows[3]["eval/tokens"] == 30
    out = capsys.readouterr().out
    assert "sft: 8 conversations, 2 held out, 1.5 epochs\nsft: 1 conversation was left out\n" in out
    assert "sft 3/3 | loss 0.500 | trained tokens/s 50" in out
    assert "held-out loss 0.6931 after step 3, the lowest so far (perplexity 2.000, 2 conversations, 30 tokens)" in out


def test_a_long_supervised_run_draws_a_thousand_points_at_most(tmp_path: Path) -> None:
    reporter = sft(tmp_path, steps=5000)
    drawn: list[int] = []
    reporter._dashboard = cast(Any, SimpleNamespace(log=lambda step, _: drawn.append(step)))
    result = StepResult(1.0, 1e-3, {"loss": 0.5}, skipped=False)
    for done in range(1, 5001):
        reporter.step(done, result, StepBatch(RankBatch([], 1.0), 4, 1), SECONDS)
    assert (len(drawn), drawn[-1]) == (1000, 5000)
