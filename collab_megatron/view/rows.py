"""A tree as one row of the list: the figures that the page sorts and filters by."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from collab_megatron.rollout.rewards import asks_question
from collab_megatron.view.compact import first_second, items, number, objects, rounded, text, timed_parts

TITLE_CHARACTERS = 160
SCORED = ("terminated", "max_turns", "truncated")  # statuses of futures that are scored (docs/record.md)


def row_of_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of a tree. None: nothing of the kind is in it; a failure is counted and never a 0.

    Example: {"step": 12, "slot": 3, "task": "table-17", "mr": 0.91, "spread": 0.4, "asked": 0.5, ...}
    """
    replies = objects(tree.get("replies"))
    futures = [future for reply in replies for future in objects(reply.get("futures"))]
    rewards = [mr for reply in replies if (mr := number(reply.get("mr"))) is not None]
    advantages = [abs(a) for reply in replies if (a := number(reply.get("advantage"))) is not None]
    asked = [float(asks_question(text(reply.get("text")))) for reply in replies]
    failures = Counter(text(future.get("status")) for future in futures if future.get("status") not in SCORED)
    versions = [v for turn in _turns(replies) for run in items(turn.get("version_runs")) for v in items(run)[:1]]
    versions = [version for version in map(number, versions) if version is not None]
    return {
        "step": number(tree.get("step")),
        "slot": number(tree.get("slot")),
        "task": text(tree.get("task_id"))[:TITLE_CHARACTERS],
        "title": _title(tree),
        "ambiguous": tree.get("ambiguous") if isinstance(tree.get("ambiguous"), bool) else None,
        "trained": tree.get("trained") if isinstance(tree.get("trained"), bool) else None,
        "kept": bool(tree.get("kept")),
        "replaced": bool(tree.get("replaced")),
        "replies": len(replies),
        "futures": len(futures),
        "mr": _mean(rewards),
        "best": rounded(max(rewards, default=None)),
        "spread": rounded(max(rewards) - min(rewards)) if rewards else None,
        "advantage": rounded(max(advantages, default=None)),
        "asked": _mean(asked),
        "metrics": _metrics(futures),
        "failures": dict(failures) | ({"no_replies": 1} if tree.get("error") else {}),
        "tokens": sum(len(items(turn.get("token_ids"))) for turn in _turns(replies)),
        "usd": _sum(call.get("cost_usd") for call in _calls(futures)),
        "seconds": _seconds(tree),
        "versions": [min(versions), max(versions)] if versions else None,
    }


def _title(tree: Mapping[str, Any]) -> str:
    """The last user turn of the prompt, on one line."""
    said = [text(message.get("content")) for message in objects(tree.get("prompt")) if message.get("role") == "user"]
    # cut before splitting: a turn may have megabytes
    line = " ".join((said[-1] if said else text(tree.get("single_turn_prompt")))[: 4 * TITLE_CHARACTERS].split())
    return line if len(line) <= TITLE_CHARACTERS else line[: TITLE_CHARACTERS - 1] + "…"


def _metrics(futures: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """Mean raw score by metric over the futures that have one."""
    found: dict[str, list[float]] = {}
    for future in futures:
        given = future.get("scores")
        for name, value in given.items() if isinstance(given, dict) else ():
            if (score := number(value)) is not None:
                found.setdefault(name, []).append(score)
    return {name: _mean(values) for name, values in sorted(found.items())}


def _turns(replies: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The replies, and the later policy turns of their futures."""
    later = [
        turn for reply in replies for future in objects(reply.get("futures")) for turn in objects(future.get("turns"))
    ]
    return [*replies, *later]


def _calls(futures: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [call for future in futures for call in objects(future.get("calls"))]


def _seconds(tree: Mapping[str, Any]) -> float | None:
    """From the tree's first request to its last answer."""
    begin = first_second(tree)
    ends = [end for part in timed_parts(tree) if (end := number(part.get("end_s")))]
    return None if begin is None or not ends else round(max(ends) - begin, 3)


def _mean(values: list[float]) -> float | int | None:
    return rounded(statistics.fmean(values)) if values else None


def _sum(values: Iterable[Any]) -> float | int | None:
    found = [value for value in map(number, values) if value is not None]
    return rounded(sum(found), 9) if found else None
