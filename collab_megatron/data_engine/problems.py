"""Single-turn problems: the input file of the data engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collab_megatron.data.dataset_source import read_json_lines
from collab_megatron.errors import UserError
from collab_megatron.text import has_half
from collab_megatron.types import Message, Task

NEEDED = ("single_turn_prompt", "single_turn_completion")


@dataclass(frozen=True)
class Problem:
    """One problem; its index in the file is the conversation's conv_id."""

    index: int
    task: Task  # its prompt is the opening, if the problem has one


def read_problems(path: Path, limit: int | None) -> list[Problem]:
    """The first `limit` problems of a JSONL file. Raises UserError naming file, problem (counted from 1) and column."""
    if not path.is_file():
        raise UserError(f"there is no problems file {path}: set `problems` in the config to a JSONL file")
    problems = []
    for index, row in enumerate(read_json_lines(path)):
        if limit is not None and index >= limit:
            break
        problems.append(_read_problem(index, row, f"{path}, problem {index + 1}"))
    if not problems:
        raise UserError(f"{path} holds no problems: write one JSON object per line")
    return problems


def _read_problem(index: int, row: Mapping[str, Any], where: str) -> Problem:
    if not isinstance(row, Mapping):
        raise UserError(f"{where} is a {type(row).__name__}: write a JSON object")
    for column in NEEDED:
        if not isinstance(row.get(column), str):
            raise UserError(f"{where} has no text {column!r}; its keys are {', '.join(row)}")
    if not row["single_turn_prompt"].strip():
        raise UserError(f"{where}: single_turn_prompt is empty: write the user's whole request, or remove the problem")
    metadata = row.get("single_turn_metadata") or {}
    if not isinstance(metadata, Mapping):
        raise UserError(f"{where}: single_turn_metadata must be a JSON object")
    task = Task(
        task_id=str(index),
        prompt=_opening(row.get("prompt"), where),
        single_turn_prompt=row["single_turn_prompt"],
        ground_truth=row["single_turn_completion"],
        task_desc=str(row.get("task_desc") or ""),
        metadata=metadata,
    )
    texts = (task.single_turn_prompt, task.ground_truth, task.task_desc, *(message.content for message in task.prompt))
    if any(map(has_half, texts)):
        raise UserError(f"{where} contains a lone surrogate (half of a character): remove it")
    return Problem(index, task)


def _opening(value: Any, where: str) -> tuple[Message, ...]:
    """The first messages of a conversation: text, or a list of {role, content} that ends with a user turn."""
    if not value:
        return ()
    if isinstance(value, str):
        return (Message("user", value),)
    try:
        messages = tuple(Message(turn["role"], turn["content"]) for turn in value)
    except (TypeError, KeyError):
        raise UserError(f"{where}: prompt must be text or a list of {{role, content}}") from None
    if not all(isinstance(part, str) for turn in messages for part in (turn.role, turn.content)):
        raise UserError(f"{where}: prompt has a turn whose role or content is not text")
    if messages[-1].role != "user" or not messages[-1].content.strip():
        raise UserError(f"{where}: prompt must end with a user turn that is not empty")
    return messages
