"""Statistics of a dataset's rows, as lines for the terminal. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean, median, pstdev

from collab_megatron.data.collab_rows import CollabRow
from collab_megatron.data.splits import task_key
from collab_megatron.text import whole_text

SHARE_OF_P95 = 0.95


def describe_rows(rows: Sequence[CollabRow]) -> list[str]:
    """What is in the rows: conversations, turns, candidates, scores, rewards and sessions. `rows` is not empty."""
    turns: dict[tuple[object, ...], list[CollabRow]] = {}
    for row in rows:
        turns.setdefault((row.conversation, row.turn_id), []).append(row)
    conversations: dict[object, int] = {}
    for conversation, _ in turns:
        conversations[conversation] = conversations.get(conversation, 0) + 1
    tasks = {task_key(row.single_turn_prompt) for row in rows}
    per_turn = [len(candidates) for candidates in turns.values()]
    lines = [
        f"{len(rows):,} rows, {len(conversations):,} conversations about {len(tasks):,} tasks",
        f"turns       {spread(list(conversations.values()))} a conversation; candidates {spread(per_turn)} a turn",
        f"score       {_scores(rows, list(turns.values()))}",
    ]
    names = sorted({name for row in rows for name in row.rewards})
    if names:
        means = ", ".join(
            f"{name} {fmean(row.rewards[name] for row in rows if name in row.rewards):.3g}" for name in names
        )
        lines.append(f"rewards     {whole_text(means)} (means)")
    futures = [future for row in rows for future in row.futures or ()]
    unknown = sum(row.futures is None for row in rows)
    if futures:
        users = [sum(message.role == "user" for message in future) for future in futures]
        lines.append(f"sessions    {len(futures):,}, of {spread(users)} user turns")
    if unknown:
        lines.append(f"sessions    of {unknown:,} rows have an unknown form and are not counted")
    return lines


def spread(values: Sequence[float]) -> str:
    """Mean and range: `2.4 (1 to 7)`; one number if all are equal."""
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{fmean(values):.3g} ({low:g} to {high:g})"


def lengths_line(lengths: Sequence[int], unit: str) -> str:
    """`120 tokens (median), 900 (95 %), 1,800 (longest)`."""
    ordered = sorted(lengths)
    p95 = ordered[min(len(ordered) - 1, int(SHARE_OF_P95 * len(ordered)))]
    return f"{median(ordered):,.0f} {unit} (median), {p95:,} (95 %), {ordered[-1]:,} (longest)"


def _scores(rows: Iterable[CollabRow], turns: Sequence[Sequence[CollabRow]]) -> str:
    rows = list(rows)
    scores = [row.score for row in rows if row.score is not None]
    if not scores:
        return "no row is scored"
    by_turn = [[row.score for row in turn if row.score is not None] for turn in turns]
    gaps = [max(found) - min(found) for found in by_turn if len(found) > 1]
    gap = f"; best minus worst of a turn: {fmean(gaps):.3g} (mean of {len(gaps):,})" if gaps else ""
    missing = len(rows) - len(scores)
    unscored = f"; {missing:,} rows are not scored" if missing else ""
    return f"{fmean(scores):.3g} (mean), {pstdev(scores):.3g} (std){gap}{unscored}"
