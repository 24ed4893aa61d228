"""A small record with hostile texts for tools/pictures.py: markup, closing tags, bidi characters and a huge turn.

The viewer shows all of it as text (docs/viewer.md).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BEGIN_S = 1795752000.0
NAME = "rl"
SCRIPT = "</script><script>alert('a table for two')</script>"
IMAGE = '<img src=x onerror="alert(1)"> <!-- </style></html>'
BIDI = "pay \u202e0001\u202c dollars, \u2066hidden\u2069 and\u200b invisible"
HUGE = "</div></script>" * 140_000  # 2.1 MB
METRIC = "<b>accuracy</b>"
TITLES = (
    "<style>* { display: none }</style> send me a taxi",
    "\u202eelbat a koob\u202c read backwards",
    "{{ 7 * 7 }} ${alert(1)} javascript:alert(1)",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
)


def hostile_trees() -> list[dict[str, Any]]:
    """The first one has a text of each kind in its conversation."""
    talk = [(HUGE, IMAGE), (BIDI, "<h1>BOOK day friday</h1>")]
    first = _tree(0, SCRIPT, [_reply("<plaintext> which day?", talk, 1.0), _reply(IMAGE, [("no", "")], -1.0)])
    others = (_tree(slot, title, [_reply("which day?", talk[1:], 0.0)]) for slot, title in enumerate(TITLES, start=1))
    return [first, *others]


def write_hostile_record(run: Path) -> None:
    """As the only record of the folder `run`, in the form of docs/record.md."""
    folder = run / "conversations" / NAME
    folder.mkdir(parents=True)
    lines = (json.dumps(tree) + "\n" for tree in hostile_trees())
    (folder / "shard0.jsonl").write_text("".join(lines), encoding="utf-8")


def _tree(slot: int, prompt: str, replies: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "schema": 1,
        "step": 1,
        "slot": slot,
        "trained": True,
        "task_id": f"<i>task-{slot}</i>",
        "ambiguous": True,
        "single_turn_prompt": prompt,
        "ground_truth": IMAGE,
        "prompt": [{"role": "user", "content": prompt}],
        "kept": True,
        "error": "",
        "replies": replies,
    }


def _reply(text: str, talk: list[tuple[str, str]], advantage: float) -> dict[str, Any]:
    """With one future: what the user and then the policy say; no policy turn after an empty one."""
    messages = []
    for user, policy in talk:
        messages.append({"role": "user", "content": user})
        messages += [{"role": "assistant", "content": policy}] if policy else []
    turns = [_turn(message["content"]) for message in messages if message["role"] == "assistant"]
    users = [_call("user", "", begin) for begin in range(len(talk))]
    future = {
        "status": "terminated",
        "messages": messages,
        "turns": turns,
        "calls": [*users, _call("judge", METRIC, len(talk))],
        "scores": {METRIC: 1.0},
        "second_scores": {},
        "details": {},
        "reward": 1.0 + advantage,
        "policy_tokens": 3 * len(turns),
        "weight_versions": [0, 0],
    }
    return {**_turn(text), "mr": 1.0 + advantage, "advantage": advantage, "futures": [future]}


def _turn(text: str) -> dict[str, Any]:
    return {
        "text": text,
        "thought": "",
        "begin_s": BEGIN_S,
        "end_s": BEGIN_S + 0.4,
        "token_ids": [88, 17, 2],
        "logprobs": [-0.21, -0.04, -0.0011],
        "version_runs": [[0, 3]],
    }


def _call(role: str, metric: str, number: int) -> dict[str, Any]:
    return {
        "role": role,
        "model": "openai/<u>x</u>",
        "begin_s": BEGIN_S + 0.5 + number,
        "end_s": BEGIN_S + 1.0 + number,
        "metric": metric,
        "requests": 1,
        "cost_usd": 0.0,
        "thought": SCRIPT,
        "marks": {},
    }
