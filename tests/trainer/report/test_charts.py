"""The first page of the dashboard, as TensorBoard reads it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from collab_megatron.trainer.report import charts
from collab_megatron.trainer.report.dashboard import Dashboard, read_metrics
from tests.conftest import REPOSITORY


def events(folder: Path) -> Any:
    return EventAccumulator(str(folder)).Reload()


def test_tensorboard_gets_the_charts_and_each_finds_its_figures_by_whole_names(tmp_path: Path) -> None:
    dashboard = Dashboard(tmp_path, first_step=0)
    dashboard.first_page()
    dashboard.close()
    found = layout_pb2.Layout()
    found.ParseFromString(events(tmp_path).Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    titles = {category.title: [chart.title for chart in category.chart] for category in found.category}
    assert titles == {group: [chart.title for chart in members] for group, members in charts.CHARTS.items()}
    assert 12 <= sum(map(len, titles.values())) <= 16
    patterns = {chart.title: list(chart.multiline.tag) for category in found.category for chart in category.chart}
    assert [name for name in ("reward/mr_mean", "reward/mr_mean_x") if re.match(patterns["reward"][0], name)] == [
        "reward/mr_mean"
    ]


def test_a_figure_on_the_first_page_has_a_description(tmp_path: Path) -> None:
    dashboard = Dashboard(tmp_path, first_step=0)
    dashboard.log(1, {"train/mfu": 0.4, "reward/accuracy_mean": 0.5, "reward/mr_std": 0.1})
    dashboard.close()
    metadata = events(tmp_path).summary_metadata
    texts = {
        name: metadata[name].summary_description for name in ("train/mfu", "reward/accuracy_mean", "reward/mr_std")
    }
    assert texts["train/mfu"].startswith("**MFU**: share of the GPUs' bf16 peak")
    assert texts["reward/accuracy_mean"].startswith("**parts of the reward**")
    assert texts["reward/mr_std"] == ""


def test_what_was_only_ever_zero_is_left_out_and_a_late_curve_begins_at_zero(tmp_path: Path) -> None:
    dashboard = Dashboard(tmp_path, first_step=0)
    for step, lost in enumerate((0.0, 0.0, 0.0, 2.0, 0.0), 1):
        dashboard.log(step, {"engine/lost": lost, "engine/retried": 0.0})
    dashboard.close()
    found = events(tmp_path)
    assert "engine/retried" not in found.Tags()["scalars"]
    assert [(point.step, point.value) for point in found.Scalars("engine/lost")] == [(1, 0), (3, 0), (4, 2), (5, 0)]
    assert [row["engine/retried"] for row in read_metrics(tmp_path)] == [0.0] * 5


def test_histograms_and_settings(tmp_path: Path) -> None:
    dashboard = Dashboard(tmp_path, first_step=0)
    dashboard.distribution(1, "distribution/reward", [0.0, 1.0, float("nan"), 1.0])
    dashboard.distribution(1, "distribution/advantage", [])
    dashboard.settings({"optimizer.lr": 1e-3, "algorithm.loss": "grpo"}, ["eval/mr"])
    dashboard.close()
    found = events(tmp_path)
    assert found.Tags()["histograms"] == ["distribution/reward"]
    (point,) = found.Histograms("distribution/reward")
    assert (point.step, point.histogram_value.num, point.histogram_value.sum) == (1, 3, 2)
    start = found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"optimizer.lr" in start
    assert b"grpo" in start


def test_operations_has_the_charts() -> None:
    assert charts.table() in (REPOSITORY / "docs" / "operations.md").read_text()


@pytest.mark.parametrize(
    "key", sorted({key for c in charts.charts() for key in re.findall(r"`(\w+)\.(\w+)`", c.action)})
)
def test_what_to_do_names_keys_that_exist(key: tuple[str, str]) -> None:
    section = (REPOSITORY / "docs" / "config.md").read_text().partition(f"\n## `{key[0]}`")[2].partition("\n## ")[0]
    assert f"| `{key[1]}` |" in section
