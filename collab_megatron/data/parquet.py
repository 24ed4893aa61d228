"""RL tasks and SFT conversations on disk: parquet written aside and renamed, read back as typed values.

Chats are lists of {role, content}; metadata is one JSON string per row, since rows of one file may hold different keys.
Nothing that is read is ever evaluated.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from collab_megatron.errors import UserError
from collab_megatron.types import Message, Task

T = TypeVar("T")

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
TASK_SCHEMA = pa.schema(
    [
        ("task_id", pa.string()),
        ("prompt", MESSAGES),
        ("single_turn_prompt", pa.string()),
        ("ground_truth", pa.string()),
        ("task_desc", pa.string()),
        ("metadata_json", pa.string()),
    ]
)
CONVERSATION_SCHEMA = pa.schema([("conv_id", pa.string()), ("messages", MESSAGES)])


@dataclass(frozen=True)
class Conversation:
    """One SFT row: a chat that ends with an assistant turn."""

    conv_id: str
    messages: tuple[Message, ...]


def write_tasks(path: Path, tasks: Iterable[Task]) -> int:
    """Write RL tasks; returns how many."""
    rows = [
        {
            "task_id": task.task_id,
            "prompt": to_turns(task.prompt),
            "single_turn_prompt": task.single_turn_prompt,
            "ground_truth": task.ground_truth,
            "task_desc": task.task_desc,
            "metadata_json": json.dumps(dict(task.metadata), ensure_ascii=False),
        }
        for task in tasks
    ]
    _write(path, rows, TASK_SCHEMA)
    return len(rows)


def read_tasks(path: str | Path) -> list[Task]:
    """RL tasks as prepare_dataset.py wrote them. Raises UserError naming the file and what is wrong with it."""
    return _read(Path(path), TASK_SCHEMA, "rl", _to_task)


def read_task_files(files: Sequence[Path]) -> tuple[list[Task], int]:
    """RL tasks of all files, in order, and how many were left out because an earlier file holds the same task.

    Raises UserError as read_tasks does, and where two files use one task_id for different tasks.
    """
    by_file = {file: read_tasks(file) for file in files}
    _refuse_shared_ids(by_file)
    return _join(by_file.values(), lambda task: (task.task_id, task.prompt, task.single_turn_prompt))


def write_conversations(path: Path, conversations: Iterable[Conversation]) -> int:
    """Write SFT conversations; returns how many."""
    rows = [{"conv_id": row.conv_id, "messages": to_turns(row.messages)} for row in conversations]
    _write(path, rows, CONVERSATION_SCHEMA)
    return len(rows)


def read_conversations(path: str | Path) -> list[Conversation]:
    """SFT conversations as prepare_dataset.py wrote them. Raises UserError naming the file and what is wrong."""
    return _read(Path(path), CONVERSATION_SCHEMA, "sft", _to_conversation)


def read_conversation_files(files: Sequence[Path]) -> tuple[list[Conversation], int]:
    """SFT conversations of all files, in order, and how many were left out because an earlier file holds the same chat.

    conv_ids count from 0 in every dataset: what decides is the messages. Raises UserError as read_conversations does.
    """
    return _join((read_conversations(file) for file in files), lambda row: row.messages)


def to_turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as plain {role, content} mappings."""
    return [{"role": message.role, "content": message.content} for message in messages]


def _to_task(row: Mapping[str, Any]) -> Task:
    metadata = json.loads(row["metadata_json"] or "{}")
    if not isinstance(metadata, dict):
        raise TypeError("metadata_json is JSON, but no mapping")
    return Task(
        task_id=_text(row, "task_id"),
        prompt=_to_messages(row["prompt"]),
        single_turn_prompt=_text(row, "single_turn_prompt"),
        ground_truth=_text(row, "ground_truth"),
        task_desc=row["task_desc"] or "",
        metadata=metadata,
    )


def _to_conversation(row: Mapping[str, Any]) -> Conversation:
    return Conversation(_text(row, "conv_id"), _to_messages(row["messages"]))


def _to_messages(turns: Any) -> tuple[Message, ...]:
    if not isinstance(turns, list) or not turns:
        raise TypeError("a chat is a list of {role, content} with at least one entry")
    return tuple(Message(_text(turn, "role"), _text(turn, "content")) for turn in turns)


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise TypeError(f"{name} must be text, not {type(value).__name__}")
    return value


def _write(path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), aside)
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)


def _read(path: Path, schema: pa.Schema, kind: str, convert: Callable[[Mapping[str, Any]], T]) -> list[T]:
    if not path.is_file():
        raise UserError(f"no file {path}: write it with tools/prepare_dataset.py --dataset-type {kind}")
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read as parquet: {error}") from None
    for name in schema.names:
        if name not in table.column_names:
            raise UserError(
                f"{path} has no column {name!r} (it has {', '.join(table.column_names)}): "
                f"write it with tools/prepare_dataset.py --dataset-type {kind}"
            )
    if table.num_rows == 0:
        raise UserError(f"{path} holds no rows")
    rows = []
    for number, row in enumerate(table.select(schema.names).to_pylist()):
        try:
            rows.append(convert(row))
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(
                f"{path}: row {number} is not of the {kind} form: {error}; write the file with "
                f"tools/prepare_dataset.py --dataset-type {kind}"
            ) from None
    return rows


def _refuse_shared_ids(by_file: Mapping[Path, Sequence[Task]]) -> None:
    first: dict[str, tuple[Task, Path]] = {}
    for file, tasks in by_file.items():
        for task in tasks:
            held, other = first.setdefault(task.task_id, (task, file))
            if other != file and (held.prompt, held.single_turn_prompt) != (task.prompt, task.single_turn_prompt):
                raise UserError(
                    f"task_id {task.task_id!r} stands for different tasks in {other} and {file}: write both files "
                    "with tools/prepare_dataset.py, which makes ids from the contents, or give the tasks other ids"
                )


def _join(files: Iterable[Sequence[T]], identity: Callable[[T], Hashable]) -> tuple[list[T], int]:
    """Rows of one file may repeat each other, which gives them weight; rows of a later file repeat none."""
    rows: list[T] = []
    seen: set[Hashable] = set()
    repeated = 0
    for here in files:
        fresh = [row for row in here if identity(row) not in seen]
        repeated += len(here) - len(fresh)
        seen.update(identity(row) for row in fresh)
        rows += fresh
    return rows, repeated
