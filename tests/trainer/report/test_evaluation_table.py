"""Table of an evaluation: metrics first, columns for openings and later turns, no row without a figure."""

from __future__ import annotations

from collab_megatron.trainer.report.evaluation_table import evaluation_table

FIGURES = {
    "accuracy": 0.5,
    "mr": 0.25,
    "clarify_rate": 0.75,
    "conversations": 1200.0,
    "conversations_failed": 3.0,
    "wall_s": 12.34,
    "simulator/user/answers": 2400.0,
    "simulator/user/cost_usd": 0.1234,
    "simulator/user/replayed": 0.0,
    "simulator/judge/answers": 7.0,
    "simulator/judge/cost_usd": 0.0,
    "simulator/judge/replayed": 1200.0,
    "simulator/cost_usd": 0.1234,
    "budget/user/gpt/calls_to_date": 3.0,
}


def test_the_table_without_parts() -> None:
    assert evaluation_table(FIGURES, ["accuracy", "interactivity"]) == [
        "accuracy                     0.500",
        "reward                       0.250",
        "asks                         0.750",
        "conversations                1,200",
        "of these failed                  3",
        "user calls                   2,400    $0.1234",
        "judge calls                      7    $0.0000, 1,200 from the journal",
        "seconds                       12.3",
    ]


def test_openings_and_later_turns_have_columns() -> None:
    parts = {"openings/accuracy": 0.6, "openings/conversations": 1000.0, "openings/conversations_failed": 3.0}
    parts |= {"later/accuracy": 0.0, "later/conversations": 200.0, "later/conversations_failed": 0.0}
    lines = evaluation_table(FIGURES | parts, ["accuracy"])
    assert [line.split() for line in lines[:2]] == [
        ["all", "openings", "later"],
        ["accuracy", "0.500", "0.600", "0.000"],
    ]
    assert lines[3] == "asks                         0.750"  # of openings by itself
    assert lines[4].split() == ["conversations", "1,200", "1,000", "200"]
