"""The comparison as text."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from collab_megatron.trainer.report.comparison_table import markdown, rich_table


def value(mean: float, low: float | None, high: float | None) -> dict[str, Any]:
    return {"mean": mean, "low": low, "high": high, "count": 10}


def row(model: str, **given: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "model": model,
        "user": "simulators.user",
        "conversations": 1000,
        "failed": 0,
        "wins": None,
        "cost_usd": 0.125,
        "calls": 2500,
        "replayed": 0,
        "difference": {},
        "figures": {"accuracy": value(0.5, 0.4, 0.6), "tokens_k": value(2.493, 2.4, 2.6)},
    }
    return plain | given


def table(*rows: dict[str, Any]) -> dict[str, Any]:
    columns = ["accuracy", "tokens_k", "interactivity"]
    return {"baseline": "base", "confidence": 0.95, "resamples": 2000, "columns": columns, "rows": list(rows)}


def test_markdown_shows_shares_times_100_and_what_differs() -> None:
    difference = {"accuracy": value(0.2, 0.1, 0.3), "tokens_k": value(-0.1, -0.3, 0.1)}
    wins = {"rate": value(0.75, 0.7, 0.8), "won": 7, "tied": 1, "lost": 2, "failed": 0, "cost_usd": 0.0}
    text = markdown(table(row("base"), row("a|b", difference=difference, wins=wins, failed=3, replayed=12)))
    lines = text.splitlines()
    assert lines[0] == (
        "| model | user | conversations | accuracy % | tokens (k) | ITR % | wins % | LLM calls | dollars |"
    )
    assert lines[1].count("|") == lines[0].count("|")
    base, other = lines[2:4]
    assert "| 50.0 [40.0, 60.0] | 2.493 [2.400, 2.600] | - | - | 2,500 | 0.1250 |" in base
    assert other.startswith(
        "| a\\|b | simulators.user | 1,000 (3 failed) | 50.0 [40.0, 60.0]* | 2.493 [2.400, 2.600] |"
    )
    assert "75.0 [70.0, 80.0]" in other
    assert "2,500 +12" in other
    assert "95 % bootstrap intervals" in text
    assert "* differs from base" in text


def test_one_model_has_no_notes_about_others() -> None:
    text = markdown(table(row("base", figures={"accuracy": value(1.0, None, None)})))
    assert "| 100.0 | - | - |" in text
    assert "differs" not in text
    assert "wins" not in text
    assert "journal" not in text


def test_the_terminal_shows_the_same_cells() -> None:
    console = Console(width=200, record=True)
    console.print(rich_table(table(row("base"), row("rl"))))
    shown = console.export_text()
    assert "50.0 [40.0, 60.0]" in shown
    assert "ITR %" in shown
