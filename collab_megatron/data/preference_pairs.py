"""CollabLLM rows to DPO pairs: at each turn of a conversation the best candidate against the worst. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from collab_megatron.data.collab_rows import CollabRow
from collab_megatron.data.parquet import Pair
from collab_megatron.data.rl_tasks import with_system
from collab_megatron.errors import UserError
from collab_megatron.types import Message


@dataclass(frozen=True)
class Pairs:
    """The pairs of a dataset, and the turns that make none.

    Example: chosen "Which day?" with MR 1.4 against rejected "BOOK today" with MR 0.2.
    """

    found: list[Pair]
    alone: int  # turns with fewer than two scored, different candidates that are not empty
    close: int  # turns whose gap of scores is not above the minimum

    @property
    def notice(self) -> str:
        """One line for the user; empty if every turn makes a pair."""
        left_out = self.alone + self.close
        turns = left_out + len(self.found)
        parts = [
            *([f"{self.alone:,} have fewer than two scored, different candidates"] if self.alone else []),
            *([f"{self.close:,} have too small a gap of scores"] if self.close else []),
        ]
        return f"left out: {left_out:,} of {turns:,} turns: {', '.join(parts)}" if left_out else ""


def preference_pairs(rows: Iterable[CollabRow], *, system_prompt: str = "", minimum_gap: float = 0.0) -> Pairs:
    """The candidate with the highest score against the one with the lowest, for each turn of each conversation whose
    gap of scores is above `minimum_gap`. Raises UserError if no turn makes a pair.

    A turn is a (conversation, turn_id, prompt): rows of two conversations with one conv_id stay apart. Of equal scores
    the first row counts.
    """
    turns: dict[tuple[object, ...], list[CollabRow]] = {}
    for row in rows:
        turns.setdefault((row.conversation, row.turn_id, row.prompt), []).append(row)
    found, alone, close = [], 0, 0
    for candidates in turns.values():
        scored = [(row.score, row) for row in candidates if row.score is not None and row.completion.strip()]
        if len({row.completion for _, row in scored}) < 2:
            alone += 1
            continue
        best_score, best = max(scored, key=lambda pair: pair[0])
        worst_score, worst = min(scored, key=lambda pair: pair[0])
        if best_score - worst_score <= minimum_gap:
            close += 1
            continue
        found.append(
            Pair(
                best.conv_id,
                with_system(best.prompt, system_prompt),
                (Message("assistant", best.completion),),
                (Message("assistant", worst.completion),),
            )
        )
    pairs = Pairs(found, alone, close)
    if not found:
        raise UserError(
            f"no turn makes a pair ({pairs.notice or 'there are no rows'}): DPO needs two scored candidates a turn, so "
            "lower --minimum-gap, or build rows with num_candidate_responses above 1"
        )
    return pairs
