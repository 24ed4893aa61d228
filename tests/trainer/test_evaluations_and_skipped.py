"""Errors that end a run and those that do not: failed evaluations, skipped steps, engines with other weights."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from collab_megatron.config import RLConfig
from collab_megatron.errors import BudgetSpent, GradientsNotFinite, NoEngineLeft, RunError, WeightsDiffer
from collab_megatron.json_lines import read_rows
from collab_megatron.train_rl import require_same_weights
from collab_megatron.trainer.actor.actor import StepResult
from collab_megatron.trainer.evaluation_schedule import EvaluationSchedule
from collab_megatron.trainer.skipped_steps import SkippedSteps, largest_norm


class Engines:
    def __init__(self, failure: Exception | None = None) -> None:
        self.failure, self.asked = failure, list[int]()

    def evaluate(self, step: int) -> dict[str, float]:
        self.asked.append(step)
        if self.failure is not None:
            raise self.failure
        return {"accuracy": 0.5, "conversations": 3.0}


class Reporter:
    def __init__(self) -> None:
        self.said: list[tuple[int, str]] = []

    def evaluation(self, step: int, figures: dict[str, float]) -> None:
        self.said.append((step, f"accuracy {figures['accuracy']}"))

    def evaluation_failed(self, step: int, why: str) -> None:
        self.said.append((step, why))


ALONE = cast(Any, SimpleNamespace(world_size=1, is_main=True))


@pytest.fixture
def config() -> RLConfig:
    return RLConfig.model_validate(
        {
            "model": {"path": "m"},
            "data": {"train": "t", "validation": "v"},
            "simulators": {"user": {"model": "u"}, "judge": {"model": "j"}},
            "train": {"steps": 5, "eval_interval": 2},
        }
    )


def told(engines: Engines, config: RLConfig) -> list[tuple[int, str]]:
    reporter = Reporter()
    found = EvaluationSchedule(cast(Any, engines), cast(Any, reporter), ALONE, config)
    found.evaluate_at_start(0)
    for done in range(1, 6):
        found.evaluate_if_due(done)
    return reporter.said


def test_evaluations_come_at_the_start_at_the_interval_and_at_the_end(config: RLConfig) -> None:
    engines = Engines()
    assert told(engines, config) == [(step, "accuracy 0.5") for step in (0, 2, 4, 5)]
    resumed = Engines()
    EvaluationSchedule(cast(Any, resumed), None, ALONE, config).evaluate_at_start(2)
    assert resumed.asked == []


@pytest.mark.slow
def test_a_resume_evaluates_what_an_earlier_attempt_did_not_get_to(config: RLConfig, tmp_path: Path) -> None:
    """After a step that an evaluation was due at, and only where its line is missing or torn."""
    from collab_megatron.trainer.rl_reporter import RLReporter, append_evaluation

    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": tmp_path})})

    def asked(done: int) -> list[int]:
        engines, reporter = Engines(), RLReporter(config, first_step=done)
        EvaluationSchedule(cast(Any, engines), reporter, ALONE, config).evaluate_missing(done)
        reporter.close()
        return engines.asked

    assert [asked(done) for done in (0, 1, 2, 5)] == [[], [], [2], [5]]
    assert [asked(done) for done in (2, 5)] == [[], [5]]  # a resume from step 2 runs step 5 again
    assert asked(5) == []
    with config.run.evaluations_file.open("rb+") as file:
        file.truncate(config.run.evaluations_file.stat().st_size - 9)
    assert asked(5) == [5]
    append_evaluation(config.run.evaluations_file, 6, {"accuracy": 0.5})
    rows = read_rows(config.run.evaluations_file)
    assert ([row["step"] for row in rows.rows], rows.torn_bytes) == ([2, 5, 6], 0)


def test_the_figures_of_a_step_that_was_cut_short_are_written_once(config: RLConfig, tmp_path: Path) -> None:
    """By the end of the run, which saves the step, where the weights did not reach the engines any more."""
    from collab_megatron.trainer.report.dashboard import read_metrics
    from collab_megatron.trainer.rl_reporter import RLReporter

    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": tmp_path})})
    reporter = RLReporter(config, first_step=0)
    reporter.to_disk()
    reporter.trained(1, {"reward/mr_mean": 0.5}, {"train/tokens": 3.0})
    sync = cast(Any, SimpleNamespace(metrics=lambda: {"sync/engines": 1.0}))
    reporter.step(1, {"reward/mr_mean": 0.5}, {"train/tokens": 3.0}, sync, {"time_s/update": 1.0})
    reporter.to_disk()
    reporter.trained(2, {"reward/mr_mean": 0.25}, {"train/tokens": 4.0})
    for _ in range(2):
        reporter.to_disk()
    reporter.close()
    rows = read_metrics(config.run.tensorboard_dir)
    assert [(row["step"], row["train/tokens"], "sync/engines" in row) for row in rows] == [(1, 3, True), (2, 4, False)]


def test_a_failed_evaluation_is_reported_and_training_goes_on(config: RLConfig) -> None:
    engines = Engines(RunError("the judge is away"))
    assert told(engines, config) == [(step, "the judge is away") for step in (0, 2, 4, 5)]


@pytest.mark.parametrize("kind", [BudgetSpent, NoEngineLeft, WeightsDiffer])
def test_what_ends_the_run_is_not_swallowed(config: RLConfig, kind: type[RunError]) -> None:
    with pytest.raises(kind):
        told(Engines(kind("x")), config)


def test_a_failed_evaluation_is_a_counter_on_the_dashboard(config: RLConfig, tmp_path: Path) -> None:
    from collab_megatron.trainer.report.dashboard import read_metrics
    from collab_megatron.trainer.rl_reporter import RLReporter

    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": tmp_path})})
    reporter = RLReporter(config, first_step=0)
    reporter.evaluation_failed(0, "x")
    reporter.evaluation_failed(2, "x")
    reporter.evaluation(4, {"accuracy": 0.5, "conversations": 3})
    reporter.close()
    rows = {row["step"]: row["eval/failed"] for row in read_metrics(config.run.tensorboard_dir) if "eval/failed" in row}
    assert rows == {0: 1, 2: 2, 4: 2}


@pytest.mark.slow
def test_a_start_over_an_attempt_without_a_checkpoint_keeps_one_line_a_step(config: RLConfig, tmp_path: Path) -> None:
    import json

    from collab_megatron.trainer.rl_reporter import RLReporter

    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": tmp_path})})
    for accuracy in (0.25, 0.5):
        reporter = RLReporter(config, first_step=0)
        reporter.evaluation(0, {"accuracy": accuracy, "conversations": 3})
        reporter.close()
    rows = [json.loads(line) for line in config.run.evaluations_file.read_text().splitlines()]
    assert [(row["step"], row["accuracy"]) for row in rows] == [(0, 0.5)]


def result(skipped: bool, **largest: float) -> StepResult:
    return StepResult(math.nan if skipped else 1.0, 1e-3, {}, skipped=skipped, largest=largest)


def test_too_many_skipped_steps_in_a_row_end_the_run() -> None:
    steps = SkippedSteps(3)
    for done, results in enumerate(([True, True, False], [True], [True]), start=1):
        steps.count([result(skipped) for skipped in results])
        steps.check(done)
    assert steps.count([result(True, log_ratio_max=2.0, ref_gap_max=93.21), result(False)]) == 3
    with pytest.raises(GradientsNotFinite) as caught:
        steps.check(4)
    sentence = str(caught.value)
    assert sentence.startswith("3 optimizer steps in a row up to step 4 had a gradient that is not finite")
    assert "largest log-prob gap in them was 93.2, between the policy and its reference (train/ref_gap_max)" in sentence
    assert "run.resume=true" in sentence


def test_no_norm_hides_one_that_is_not_finite() -> None:
    for norms in ([1.0, math.nan], [math.nan, 1.0], [1.0, math.inf]):
        assert not math.isfinite(largest_norm([StepResult(norm, 0.0, {}, skipped=False) for norm in norms]))
    assert largest_norm([StepResult(norm, 0.0, {}, skipped=False) for norm in (1.0, 3.0, 2.0)]) == 3.0


@pytest.mark.parametrize("gap", [0.51, float("nan")])
def test_engines_that_sample_from_other_weights_stop_the_run(gap: float) -> None:
    with pytest.raises(RunError, match=r"differ by .* \(sync\.max_logprob_gap is 0\.5\)"):
        require_same_weights({"train/on_policy_gap": gap}, 0.5)
    require_same_weights({"train/on_policy_gap": 0.5}, 0.5)
    require_same_weights({}, 0.5)  # no token of the newest weights: nothing to compare
