"""Timers, alarms, progress line and dashboard."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

from collab_megatron.rollout.busy import BusyClock
from collab_megatron.text import duration
from collab_megatron.trainer.report.alarms import Alarms
from collab_megatron.trainer.report.dashboard import Dashboard, read_metrics
from collab_megatron.trainer.report.progress_line import ProgressLine, steps_between
from collab_megatron.trainer.report.timers import PhaseTimer
from collab_megatron.trainer.rl_reporter import memory_shares, progress_figures


def test_overlapping_calls_count_once() -> None:
    clock = BusyClock()
    start = time.monotonic()
    with clock:
        time.sleep(0.02)
        with clock:
            time.sleep(0.02)
    assert 0.04 <= clock.seconds() <= time.monotonic() - start
    before = clock.seconds()
    time.sleep(0.02)
    assert clock.seconds() == before


def test_phases_add_up_and_start_anew() -> None:
    timer = PhaseTimer()
    for _ in range(2):
        with timer("update"):
            time.sleep(0.01)
    assert timer.drain()["time_s/update"] >= 0.02
    assert timer.drain() == {}


@pytest.mark.parametrize("total, every", [(1, 1), (20, 1), (100, 1), (101, 2), (900, 10), (2000, 20), (100_000, 1000)])
def test_the_longer_a_run_the_rarer_its_signs_of_life(total: int, every: int) -> None:
    assert steps_between(total, 100) == every
    assert total // every <= 100


def test_durations() -> None:
    assert [duration(s) for s in (42.4, 186, 7500)] == ["42s", "3m06s", "2h05m"]


def test_the_progress_line_tells_where_training_stands(capsys: pytest.CaptureFixture[str]) -> None:
    progress = ProgressLine("rl", first_step=2, total_steps=6, every=2)
    for done in range(3, 7):
        progress.step(done, {"reward": "1.5"})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["rl 4/6", "rl 6/6"]
    assert lines[1].endswith("0s left")


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    """What TensorBoard shows of a figure: (step, value) in order, a step twice where the curve is doubled."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return [(event.step, round(event.value, 3)) for event in events.Scalars(name)]


def lines(folder: Path, name: str) -> list[tuple[float, float]]:
    """The same of metrics.jsonl."""
    return [(row["step"], row[name]) for row in read_metrics(folder) if name in row]


def test_a_resume_keeps_the_points_of_the_checkpoints_own_step_and_drops_what_runs_again(tmp_path: Path) -> None:
    name = "reward/mr_mean"
    dashboard = Dashboard(tmp_path, first_step=0)
    dashboard.log(0, {"eval/mr": 0.0})
    for step in range(1, 5):
        dashboard.log(step, {name: step / 10, "bad": math.nan})
    dashboard.log(2, {"eval/mr": 0.2})
    dashboard.close()
    dashboard = Dashboard(tmp_path, first_step=2)
    dashboard.log(3, {name: 0.7})
    dashboard.close()
    assert curve(tmp_path, name) == lines(tmp_path, name) == [(1, 0.1), (2, 0.2), (3, 0.7)]
    assert curve(tmp_path, "eval/mr") == lines(tmp_path, "eval/mr") == [(0, 0.0), (2, 0.2)]
    assert "bad" not in read_metrics(tmp_path)[0]


@pytest.mark.slow
def test_a_start_over_an_attempt_without_a_checkpoint_does_not_double_the_curves(tmp_path: Path) -> None:
    for value in (0.1, 0.5):
        dashboard = Dashboard(tmp_path, first_step=0)
        dashboard.log(0, {"eval/mr": value})
        dashboard.log(1, {"reward/mr_mean": value})
        dashboard.close()
    assert curve(tmp_path, "eval/mr") == lines(tmp_path, "eval/mr") == [(0, 0.5)]
    assert curve(tmp_path, "reward/mr_mean") == lines(tmp_path, "reward/mr_mean") == [(1, 0.5)]


@pytest.mark.slow
def test_every_step_has_the_number_of_the_attempt_that_made_it(tmp_path: Path) -> None:
    for attempt, first in ((1, 0), (2, 2)):
        dashboard = Dashboard(tmp_path, first_step=first, attempt=attempt)
        for step in range(first + 1, first + 4):
            dashboard.log(step, {"reward/mr_mean": 0.5})
            dashboard.log(step, {"time_s/checkpoint": 1.0})
        dashboard.close()
    numbers = [(1, 1), (2, 1), (3, 2), (4, 2), (5, 2)]
    assert curve(tmp_path, "run/attempt") == numbers
    assert lines(tmp_path, "run/attempt") == [each for each in numbers for _ in range(2)]


def test_a_line_cut_short_by_a_full_disk_does_not_stop_a_resume(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 0.5}\n{"step": 2, "a"')
    Dashboard(tmp_path, first_step=2).close()
    assert read_metrics(tmp_path) == [{"step": 1, "a": 0.5}]


def test_an_alarm_is_told_when_it_begins_and_again_after_it_has_ended() -> None:
    alarms = Alarms()
    told = [alarms.check(done, {"rollout/cut_share": share}) for done, share in enumerate([0.6, 0.6, 0.0, 0.0, 0.8], 1)]
    assert [len(sentences) for sentences in told] == [1, 0, 0, 0, 0]
    assert told[0][0].startswith("step 1: 60% of the replies are cut at the token limit")
    (again,) = Alarms().check(3, {"rollout/cut_share": 1.0})
    assert "step 3" in again
    later = [alarms.check(done, {"rollout/cut_share": 0.9}) for done in range(6, 11)]
    assert [sentence for sentences in later for sentence in sentences] == [
        "steps 3 to 7: 52% of the replies are cut at the token limit: raise rollout.max_new_tokens, or look at the "
        "conversations for replies that do not end"
    ]


def test_groups_without_spread_and_full_memories_are_told() -> None:
    figures = {"advantage/groups_with_signal": 0.25, "system/host_memory_share": 0.97, "rollout/cut_share": 0.1}
    groups, memory = Alarms().check(1, figures)
    assert groups.startswith("step 1: only 25% of the groups have rewards that differ")
    assert memory.startswith("step 1: 97% of the machine's memory is in use")
    assert not Alarms().check(1, {"advantage/groups_with_signal": 0.75, "system/host_memory_share": 0.5})
    assert not Alarms().check(1, {})


def test_memory_shares_are_of_this_machine() -> None:
    assert 0 < memory_shares()["system/host_memory_share"] < 1


def test_the_progress_line_shows_the_metrics_of_this_run_and_nothing_that_the_data_does_not_tell() -> None:
    metrics = {"reward/mr_mean": 0.5, "reward/brevity_mean": 0.25, "reward/accuracy_mean": 1.0, "train/kl": 0.01}
    shown = progress_figures({**metrics, "rollout/clarify_rate": 0.4, "rollout/tokens_per_s": 1234.0}, ["brevity"])
    assert shown == {"reward": "0.50", "brevity": "0.25", "asks": "0.40", "kl": "0.01", "tokens/s": "1,234"}
    shown = progress_figures({**metrics, "rollout/clarify_rate_ambiguous": 0.9}, ["accuracy", "brevity"])
    assert shown == {"reward": "0.50", "accuracy": "1.00", "brevity": "0.25", "asks if unclear": "0.90", "kl": "0.01"}
