"""Collect a demo's figures from the files of its stages into summary.json, and print the closing table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from collab_megatron.errors import UserError
from collab_megatron.files import publish_json
from collab_megatron.json_lines import read_rows
from collab_megatron.rollout.llm.accounting import API_USAGE_FILE

# name -> figure of the evaluations. The first ones are with the user that gives whole answers
HELD_OUT = {
    "accuracy": "accuracy",
    "clarify_rate_ambiguous": "clarify_rate_ambiguous",
    "clarify_rate_complete": "clarify_rate_complete",
    "mr": "mr",
    "accuracy_bare_answers": "users/bare/accuracy",
    "accuracy_unseen_user": "users/unseen/accuracy",
}
STAGES = ("base", "sft", "rl", "rl_reply_only", "rl_no_interactivity")


def read_summary(run_dir: Path) -> dict[str, Any]:
    """Raises UserError if no demo has finished in `run_dir`."""
    path = run_dir / "summary.json"
    if not path.exists():
        raise UserError(f"there is no {path}: run `make demo` first")
    summary: dict[str, Any] = json.loads(path.read_text())
    return summary


def write_summary(run_dir: Path, *, wall_s: Mapping[str, float], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Write RUN_DIR/summary.json from the evaluations and usage files below it; returns its contents."""
    evaluations = _evaluations(run_dir)
    summary: dict[str, Any] = {
        name: {stage: round(figures[figure], 4) for stage, figures in evaluations.items() if figure in figures}
        for name, figure in HELD_OUT.items()
    }
    summary["conversations"] = {stage: int(figures["conversations"]) for stage, figures in evaluations.items()}
    summary["wall_s"] = {stage: round(seconds, 1) for stage, seconds in wall_s.items()}
    summary["api_calls"] = _api_calls(run_dir)
    newest = sorted(run_dir.rglob("logs/*/latest/resolved.yaml"))
    resolved = {path.parent.parent.name: path.read_text() for path in newest}
    summary["config"] = {"settings": dict(settings), **resolved}
    publish_json(run_dir / "summary.json", summary)
    return summary


def print_summary(summary: Mapping[str, Any], run_dir: Path) -> None:
    """Print the table, the paths of the files, and the next command."""
    stages = [stage for stage in STAGES if stage in summary["accuracy"]]
    table = Table(title="held-out conversations, temperature 0")
    table.add_column("")
    for stage in stages:
        table.add_column(stage.replace("_", " "), justify="right")
    for name in HELD_OUT:
        found = summary.get(name, {})  # a summary of an earlier version has no further users
        table.add_row(name.replace("_", " "), *(f"{found[stage]:.3f}" if stage in found else "-" for stage in stages))
    console = Console(width=110)
    console.print()
    console.print(table)
    total = sum(summary["wall_s"].values())
    calls = sum(summary["api_calls"].values())
    console.print(f"{total / 60:.1f} minutes, {calls:,} LLM calls, {summary['conversations']['base']} held-out tasks")
    for what, where in (
        ("figures", "summary.json"),
        ("conversations", "conversations/rl/"),
        ("final model", "hf/"),
        ("checkpoints", "checkpoints/"),
        ("logs", "logs/"),
    ):
        console.print(f"  {what:14s} {run_dir / where}", highlight=False, soft_wrap=True)
    console.print(f"\n  .venv/bin/tensorboard --logdir {run_dir / 'tensorboard'}\n", highlight=False, soft_wrap=True)


def _evaluations(run_dir: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {"base": json.loads((run_dir / "evaluation_base.json").read_text())}
    by_step = _by_step(run_dir / "evaluations" / "rl.jsonl")
    found["sft"], found["rl"] = by_step[0], by_step[max(by_step)]
    for stage in ("rl_reply_only", "rl_no_interactivity"):
        path = run_dir / "ablation" / stage / "evaluations" / f"{stage}.jsonl"
        if path.exists():
            by_step = _by_step(path)
            found[stage] = by_step[max(by_step)]
    return found


def _by_step(path: Path) -> dict[int, dict[str, float]]:
    return {int(row["step"]): row for row in read_rows(path, numbers=("step",)).rows}


def _api_calls(run_dir: Path) -> dict[str, int]:
    """Calls per role over all stages."""
    usages = [json.loads((run_dir / "evaluation_base.json").read_text())]
    usages += [json.loads(path.read_text()) for path in sorted(run_dir.rglob(API_USAGE_FILE))]
    calls: dict[str, int] = {}
    for usage in usages:
        for name, value in usage.items():
            if name.startswith("simulator/") and name.endswith("/calls"):
                role = name.split("/")[1]
                calls[role] = calls.get(role, 0) + int(value)
    return calls
