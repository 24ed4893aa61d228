"""CollabLLM rows to SFT conversations: the longest and best path of each conversation. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable

from collab_megatron.data.collab_rows import CollabRow
from collab_megatron.data.parquet import Conversation
from collab_megatron.data.rl_tasks import with_system
from collab_megatron.errors import UserError
from collab_megatron.types import Message


def sft_conversations(
    rows: Iterable[CollabRow], *, system_prompt: str = "", metric: str | None = None, threshold: float = 0.0
) -> list[Conversation]:
    """One chat per conversation: prompt and completion of the row with the highest turn_id, then the highest score.

    With `metric`, only rows whose reward with that name reaches `threshold` count, so a conversation may fall back to
    an earlier turn or drop out. Raises UserError if no row has that reward, or no row is left.
    """
    rows = list(rows)
    if metric is not None:
        if not any(metric in row.rewards for row in rows):
            raise UserError(f"no row has a reward named {metric!r}: choose another --metric, or leave it out")
        rows = [row for row in rows if row.rewards.get(metric, -math.inf) >= threshold]
        if not rows:
            raise UserError(f"no row reaches {metric} >= {threshold}: lower the threshold")
    best: dict[tuple[str, str], CollabRow] = {}
    for row in rows:
        held = best.get(row.conversation)
        if held is None or _rank(row) > _rank(held):
            best[row.conversation] = row
    return [
        Conversation(row.conv_id, (*with_system(row.prompt, system_prompt), Message("assistant", row.completion)))
        for row in best.values()
    ]


def _rank(row: CollabRow) -> tuple[int, float]:
    return row.turn_id, -math.inf if row.score is None else row.score
