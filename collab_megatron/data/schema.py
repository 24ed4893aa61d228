"""CollabLLM rows as typed values: one row per (conversation, turn, candidate reply), whatever form they came in.

flat form    one row as it is here
nested form  {single_turn_prompt, ..., turns: [{prompt, responses: [{completion, score, sessions, rewards}]}]}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from collab_megatron.errors import UserError
from collab_megatron.types import Message

FLAT_COLUMNS = ("prompt", "completion", "conv_id", "turn_id", "single_turn_prompt")
NESTED_COLUMNS = ("single_turn_prompt", "turns")
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class CollabRow:
    """One candidate reply at one turn of one conversation."""

    prompt: tuple[Message, ...]  # the chat so far; ends with a user turn
    completion: str
    conv_id: str
    turn_id: int
    single_turn_prompt: str
    single_turn_completion: str = ""
    ground_truth: str = ""
    task_desc: str = ""
    score: float | None = None  # MR; None: not scored
    rewards: Mapping[str, float] = field(default_factory=dict)  # metric -> mean over the sessions
    metadata: Mapping[str, Any] = field(default_factory=dict)  # single_turn_metadata


def read_rows(raw: Iterable[Mapping[str, Any]], source: str) -> list[CollabRow]:
    """Rows of either form. Raises UserError naming source, row and column for anything that cannot be read."""
    rows: list[CollabRow] = []
    for number, row in enumerate(raw):
        if not isinstance(row, Mapping):
            raise UserError(f"{source}: row {number} is a {type(row).__name__}, not a mapping of columns")
        nested = row.get("turns") is not None
        _check_columns(row, NESTED_COLUMNS if nested else FLAT_COLUMNS, source)
        where = f"{source}: row {number}"
        for flat in _flatten(row, number, where) if nested else (row,):
            rows.append(_read_row(flat, where))
    if not rows:
        raise UserError(f"{source} holds no rows")
    return rows


def _check_columns(row: Mapping[str, Any], needed: Sequence[str], source: str) -> None:
    for column in needed:
        if column not in row:
            raise UserError(f"{source} has no column {column!r}; its columns are {', '.join(map(str, row))}")


def _flatten(row: Mapping[str, Any], number: int, where: str) -> Iterator[Mapping[str, Any]]:
    shared = {name: value for name, value in row.items() if name != "turns"}
    shared.setdefault("conv_id", number)
    for turn_id, turn in enumerate(_list(row["turns"], f"{where}: turns")):
        for response in _list(turn.get("responses"), f"{where}: turns[{turn_id}].responses"):
            yield {**shared, "prompt": turn.get("prompt"), "turn_id": turn_id, **response}


def _read_row(row: Mapping[str, Any], where: str) -> CollabRow:
    prompt = _messages(row["prompt"], f"{where}: prompt")
    if prompt[-1].role != "user":
        raise UserError(f"{where}: prompt must end with a user turn, not with {prompt[-1].role!r}")
    return CollabRow(
        prompt=prompt,
        completion=_text(row.get("completion"), f"{where}: completion"),
        conv_id=str(row["conv_id"]),
        turn_id=_whole(row["turn_id"], f"{where}: turn_id"),
        single_turn_prompt=_text(row["single_turn_prompt"], f"{where}: single_turn_prompt"),
        single_turn_completion=_text(row.get("single_turn_completion") or "", f"{where}: single_turn_completion"),
        ground_truth=_text(row.get("ground_truth") or "", f"{where}: ground_truth"),
        task_desc=_text(row.get("task_desc") or "", f"{where}: task_desc"),
        score=_number(row.get("score"), f"{where}: score"),
        rewards=_rewards(row.get("rewards"), f"{where}: rewards"),
        metadata=_mapping(row.get("single_turn_metadata"), f"{where}: single_turn_metadata"),
    )


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    turns = [Message(str(t["role"]), t["content"]) for t in _list(value, where) if "role" in t and "content" in t]
    if not turns or len(turns) != len(value):
        raise UserError(f"{where} must be a list of {{role, content}} with at least one entry")
    for turn in turns:
        if turn.role not in ROLES or not isinstance(turn.content, str):
            raise UserError(f"{where}: roles are {', '.join(ROLES)} and contents are text")
    return tuple(turns)


def _list(value: Any, where: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise UserError(f"{where} must be a list of mappings")
    return value


def _mapping(value: Any, where: str) -> dict[str, Any]:
    """A mapping, or one as JSON text. Columns that other rows brought and parquet filled with null are left out."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise UserError(f"{where} is text, but not JSON") from None
    if not value:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{where} must be a mapping")
    return {str(name): item for name, item in value.items() if item is not None}


def _rewards(value: Any, where: str) -> dict[str, float]:
    rewards = {}
    for metric, item in _mapping(value, where).items():
        items = item if isinstance(item, list) else [item]
        numbers = [n for n in (_number(one, f"{where}.{metric}") for one in items) if n is not None]
        if numbers:
            rewards[metric] = sum(numbers) / len(numbers)
    return rewards


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where} must be text, not {type(value).__name__}")
    return value


def _number(value: Any, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{where} must be a number, not {type(value).__name__}")
    return float(value)


def _whole(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{where} must be a whole number, not {type(value).__name__}")
    return value
