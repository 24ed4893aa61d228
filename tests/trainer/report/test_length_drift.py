"""Length drift is measured against the run's first steps, whichever attempt did them."""

from __future__ import annotations

import pytest

from collab_megatron.trainer.report.length_drift import FIRST_STEPS, LengthDrift

REPLY, CONVERSATION = "rollout/reply_tokens_mean", "hacking/conversation_tokens_mean"


def row(step: int, reply: float, conversation: float = 100.0) -> dict[str, float]:
    return {"step": float(step), REPLY: reply, CONVERSATION: conversation}


def test_the_ratio_is_to_the_mean_of_the_first_steps() -> None:
    drift = LengthDrift([])
    for step in range(1, FIRST_STEPS):
        assert drift.figures(step, row(step, 10.0)) == {}
    drift.figures(FIRST_STEPS, row(FIRST_STEPS, 20.0))
    mean = (10.0 * (FIRST_STEPS - 1) + 20.0) / FIRST_STEPS
    found = drift.figures(40, row(40, 24.0, 150.0))
    assert found["hacking/reply_length_ratio"] == pytest.approx(24.0 / mean)
    assert found["hacking/conversation_length_ratio"] == pytest.approx(1.5)


def test_a_resumed_run_knows_the_first_steps_from_the_dashboard() -> None:
    rows = [row(step, 10.0) for step in range(FIRST_STEPS + 3)]
    rows[0][REPLY] = 500.0  # step 0 is an evaluation
    found = LengthDrift(rows).figures(20, row(20, 30.0))
    assert found["hacking/reply_length_ratio"] == pytest.approx(3.0)


def test_a_step_without_the_figure_has_no_ratio() -> None:
    rows = [row(step, 10.0) for step in range(1, FIRST_STEPS + 1)]
    assert LengthDrift(rows).figures(9, {}) == {}
    assert LengthDrift([row(step, 0.0, 0.0) for step in range(1, FIRST_STEPS + 1)]).figures(9, row(9, 1.0)) == {}
