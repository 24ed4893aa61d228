"""Traces of single steps: which ranks and steps leave one, and what a server that refuses costs."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from collab_megatron.config.sections import ProfileSection, RunSection
from collab_megatron.launch.attempts import begin_attempt
from collab_megatron.trainer.actor.grid import RankGrid
from collab_megatron.trainer.report.timers import PhaseTimer
from collab_megatron.trainer.step_profiler import StepProfiler
from collab_megatron.wire.roster import EngineEntry


def grid(rank: int) -> RankGrid:
    return cast(RankGrid, SimpleNamespace(rank=rank, is_main=rank == 0, device=torch.device("cpu")))


def names_in(file: Path) -> set[str]:
    trace: dict[str, Any] = json.loads(gzip.decompress(file.read_bytes()))
    return {event.get("name", "") for event in trace["traceEvents"]}


def test_a_traced_step_has_its_phases_and_operations(tmp_path: Path) -> None:
    profiler, timer = StepProfiler(ProfileSection(steps=(2,)), tmp_path / "profile", grid(0)), PhaseTimer()
    for number in (1, 2, 3):
        with profiler.step(number), timer("update"):
            torch.ones(3, 3) @ torch.ones(3, 3)
    assert [file.name for file in (tmp_path / "profile").iterdir()] == ["step-2.trainer-0.json.gz"]
    assert {"update", "aten::mm"} <= names_in(tmp_path / "profile" / "step-2.trainer-0.json.gz")


def test_only_the_named_ranks_are_traced(tmp_path: Path) -> None:
    for rank in (0, 1, 2):
        with StepProfiler(ProfileSection(steps=(1,), ranks=(0, 2)), tmp_path, grid(rank)).step(1):
            pass
    names = ["step-1.trainer-0.json.gz", "step-1.trainer-2.json.gz"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names


def test_a_step_that_fails_leaves_no_trace(tmp_path: Path) -> None:
    profiler = StepProfiler(ProfileSection(steps=(1,)), tmp_path, grid(0))
    with pytest.raises(ValueError, match="a batch"), profiler.step(1):
        raise ValueError("a batch is wrong")
    assert list(tmp_path.iterdir()) == []
    with profiler.step(1):  # torch's profiler can be started again
        pass
    assert len(list(tmp_path.iterdir())) == 1


def test_a_server_that_cannot_be_asked_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gone = EngineEntry("engine-0", "http://127.0.0.1:9", 1)
    profiler = StepProfiler(ProfileSection(steps=(1,)), tmp_path, grid(0), lambda: (gone,))
    with caplog.at_level(logging.WARNING), profiler.step(1):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["step-1.trainer-0.json.gz"]
    assert "no trace of engine-0: engine http://127.0.0.1:9 is gone during start_profile" in caplog.text
    assert "stop_profile" not in caplog.text


def test_traces_lie_next_to_the_logs_of_their_attempt(tmp_path: Path) -> None:
    run = RunSection(dir=tmp_path)
    assert run.profile_dir(1).parent == begin_attempt(run.logs_dir).folder
