"""Rows that fit into the token limit of a run. Longer rows are left out, counted and reported to the user. Pure.

If more than MOST_LEFT_OUT of the rows are too long, UserError: the rest would be another dataset than the config's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from collab_megatron.config.sections import EngineSection
from collab_megatron.errors import UserError
from collab_megatron.types import Message, Task

T = TypeVar("T")

MOST_LEFT_OUT = 0.5


class PromptEncoder(Protocol):
    """The part of ChatTemplate (data/chat.py) that is used here."""

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]: ...


@dataclass(frozen=True)
class FittingRows(Generic[T]):
    """The rows of a dataset that fit, and what was left out."""

    kept: list[T]
    left_out: int
    notice: str  # one line for the user; empty if nothing was left out

    @property
    def share_left_out(self) -> float:
        return self.left_out / (self.left_out + len(self.kept))


def keep_fitting(
    rows: Sequence[T], tokens: Sequence[int], room: int, *, what: str, name: Callable[[T], str], remedy: str
) -> FittingRows[T]:
    """The rows with at most `room` tokens; `tokens` has the length of each row.

    For messages: `what` is a plural noun, `name` gives the name of one row, `remedy` says what to change.
    Raises UserError if more than MOST_LEFT_OUT of the rows do not fit.
    """
    kept = [row for row, length in zip(rows, tokens, strict=True) if length <= room]
    left_out = len(rows) - len(kept)
    if not left_out:
        return FittingRows(kept, 0, "")
    longest = max(range(len(rows)), key=tokens.__getitem__)
    sentence = (
        f"{left_out:,} of {len(rows):,} {what} ({left_out / len(rows):.1%}) have more than {room:,} tokens; the "
        f"longest, {name(rows[longest])}, has {tokens[longest]:,}"
    )
    if left_out > MOST_LEFT_OUT * len(rows):
        raise UserError(f"{sentence}: {remedy}")
    return FittingRows(kept, left_out, f"left out: {sentence}")


def fitting_tasks(
    tasks: Sequence[Task], chat: PromptEncoder, *, max_prompt_tokens: int, max_context_tokens: int, max_new_tokens: int
) -> FittingRows[Task]:
    """The tasks whose prompt leaves room for a reply. Raises UserError if more than half of the prompts do not."""
    room = min(max_prompt_tokens, max_context_tokens - max_new_tokens)
    if room < 1:
        raise UserError(
            f"rollout.max_new_tokens={max_new_tokens} leaves no room for a prompt in {max_context_tokens:,} tokens of "
            "context: lower rollout.max_new_tokens, or raise engine.context_length if it is set"
        )
    if room == max_prompt_tokens:
        remedy = "raise rollout.max_prompt_tokens"
    else:
        remedy = f"lower rollout.max_new_tokens, which leaves {room:,} of {max_context_tokens:,} tokens of context"
    return keep_fitting(
        tasks,
        [len(chat.prompt_ids(task.prompt)) for task in tasks],
        room,
        what="prompts",
        name=lambda task: f"task {task.task_id}",
        remedy=f"{remedy}, or keep only openings (tools/prepare_dataset.py --turns first)",
    )


def max_context_tokens(hf_config: Mapping[str, Any], engine: EngineSection) -> int:
    """The most tokens of prompt and reply together in the engine."""
    limits = [limit for limit in (engine.context_length, hf_config.get("max_position_embeddings")) if limit]
    return min(limits) if limits else 2**31 - 1


def first_prompts(tasks: Sequence[Task], chat: PromptEncoder, count: int, *, room: int) -> list[tuple[int, ...]]:
    """Ids of the first `count` different prompts with at most `room` tokens, in the order of the tasks."""
    found: dict[tuple[int, ...], None] = {}
    for task in tasks:
        ids = tuple(chat.prompt_ids(task.prompt))
        if len(ids) <= room:
            found[ids] = None
        if len(found) == count:
            break
    return list(found)
