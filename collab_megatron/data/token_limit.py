"""Which rows fit into the token limit of a run. Those that do not are left out and counted, and the user is told. Pure.

Past MOST_LEFT_OUT of them the run is refused: what is left is another dataset than the one that was named.
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
    """A chat template (data/chat.py)."""

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]: ...


@dataclass(frozen=True)
class FittingRows(Generic[T]):
    """The rows of a dataset that a run can use."""

    kept: list[T]
    left_out: int
    notice: str  # one line for the user; empty where nothing was left out

    @property
    def share_left_out(self) -> float:
        return self.left_out / (self.left_out + len(self.kept))


def keep_fitting(
    rows: Sequence[T], tokens: Sequence[int], room: int, *, what: str, name: Callable[[T], str], remedy: str
) -> FittingRows[T]:
    """The rows of at most `room` tokens; `tokens` has the length of each row.

    what: plural noun for messages; name: how a message calls one row; remedy: what to do against too little room.
    Raises UserError where more than MOST_LEFT_OUT of the rows do not fit.
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
    """The tasks whose prompt leaves room for a reply. Raises UserError where more than half do not."""
    room = min(max_prompt_tokens, max_context_tokens - max_new_tokens)
    if room < 1:
        raise UserError(
            f"rollout.max_new_tokens={max_new_tokens} leaves nothing of {max_context_tokens:,} tokens of context for a "
            "prompt: lower rollout.max_new_tokens, or raise engine.context_length where it is set"
        )
    if room == max_prompt_tokens:
        remedy = "raise rollout.max_prompt_tokens"
    else:
        remedy = f"lower rollout.max_new_tokens: of {max_context_tokens:,} tokens of context {room:,} are left"
    return keep_fitting(
        tasks,
        [len(chat.prompt_ids(task.prompt)) for task in tasks],
        room,
        what="prompts",
        name=lambda task: f"task {task.task_id}",
        remedy=f"{remedy}, or keep openings only (tools/prepare_dataset.py --turns first)",
    )


def max_context_tokens(hf_config: Mapping[str, Any], engine: EngineSection) -> int:
    """Tokens that prompt and reply may take together in the engine."""
    limits = [limit for limit in (engine.context_length, hf_config.get("max_position_embeddings")) if limit]
    return min(limits) if limits else 2**31 - 1


def first_prompts(tasks: Sequence[Task], chat: PromptEncoder, count: int, *, room: int) -> list[tuple[int, ...]]:
    """Ids of the first `count` different prompts of at most `room` tokens, in the order of the tasks."""
    found: dict[tuple[int, ...], None] = {}
    for task in tasks:
        ids = tuple(chat.prompt_ids(task.prompt))
        if len(ids) <= room:
            found[ids] = None
        if len(found) == count:
            break
    return list(found)
