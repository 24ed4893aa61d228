"""Lines of a record for tests, in the form of docs/record.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BEGIN_S = 1795752000.0


def a_call(**values: Any) -> dict[str, Any]:
    return {
        "role": "user",
        "model": "openai/x",
        "begin_s": BEGIN_S + 0.5,
        "end_s": BEGIN_S + 1.0,
        "metric": "",
        "requests": 1,
        "cost_usd": 0.25,
        "thought": "it asks for the day",
        "marks": {},
        **values,
    }


def a_future(**values: Any) -> dict[str, Any]:
    return {
        "status": "terminated",
        "messages": [{"role": "user", "content": "Friday."}],
        "turns": [],
        "calls": [a_call(), a_call(role="judge", metric="interactivity", marks={"understanding": 1})],
        "scores": {"accuracy": 1.0},
        "second_scores": {},
        "details": {"accuracy": {"decided_by": "rule"}},
        "reward": 0.9,
        "policy_tokens": 3,
        "weight_versions": [11, 11],
        **values,
    }


def a_reply(**values: Any) -> dict[str, Any]:
    return {
        "text": "Which day?",
        "thought": "no day yet",
        "begin_s": BEGIN_S,
        "end_s": BEGIN_S + 0.4,
        "token_ids": [88, 17, 2],
        "logprobs": [-0.21, -0.04, -0.0011],
        "version_runs": [[10, 1], [11, 2]],
        "mr": 0.9,
        "advantage": 1.5,
        "futures": [a_future()],
        **values,
    }


def a_tree(**values: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "step": 12,
        "slot": 3,
        "trained": True,
        "task_id": "table-17",
        "ambiguous": True,
        "single_turn_prompt": "Book a table on Friday.",
        "ground_truth": "BOOK friday",
        "prompt": [{"role": "user", "content": "I need a table."}],
        "kept": True,
        "error": "",
        "replies": [a_reply(), a_reply(text="Done.", mr=0.4, advantage=-1.5)],
        **values,
    }


def write_record(run: Path, *trees: dict[str, Any], name: str = "rl") -> Path:
    """A run's folder with these trees as its record."""
    folder = run / "conversations" / name
    folder.mkdir(parents=True)
    (folder / "shard0.jsonl").write_text("".join(json.dumps(tree) + "\n" for tree in trees))
    return run
