"""Clocks, progress line and dashboard."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

from collab_megatron.monitor.busy import BusyClock
from collab_megatron.monitor.dashboard import Dashboard, read_metrics
from collab_megatron.monitor.progress import Progress, duration, steps_between
from collab_megatron.monitor.timers import PhaseTimer


def test_overlapping_calls_count_once() -> None:
    clock = BusyClock()
    start = time.monotonic()
    with clock:
        time.sleep(0.02)
        with clock:
            time.sleep(0.02)
    assert clock.calls == 2
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
    progress = Progress("rl", first_step=2, total_steps=6, every=2)
    for done in range(3, 7):
        progress.step(done, {"reward": "1.5"})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["rl 4/6", "rl 6/6"]
    assert lines[1].endswith("0s left")


def test_the_dashboard_writes_events_that_tensorboard_reads_and_drops_what_runs_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    dashboard = Dashboard(tmp_path, first_step=0)
    for step in range(1, 5):
        dashboard.log(step, {"reward/mr_mean": step / 10, "bad": math.nan})
    dashboard.close()
    dashboard = Dashboard(tmp_path, first_step=2)
    dashboard.log(3, {"reward/mr_mean": 0.7})
    dashboard.close()
    rows = read_metrics(tmp_path)
    assert [(row["step"], row["reward/mr_mean"]) for row in rows] == [(1, 0.1), (2, 0.2), (3, 0.7)]
    assert "bad" not in rows[0]
    events = EventAccumulator(str(tmp_path)).Reload()
    values = {event.step: event.value for event in events.Scalars("reward/mr_mean")}
    assert values[3] == pytest.approx(0.7)
