"""RL tasks, SFT conversations and DPO pairs as parquet files, written atomically and read back as typed values.

Chats are lists of {role, content}. Metadata is one JSON string per row, because rows of a file may have different keys.
Nothing that is read is evaluated. Error messages count rows from 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from collab_megatron.data.collab_rows import ROLES
from collab_megatron.data.parquet_columns import ParquetColumns
from collab_megatron.errors import UserError
from collab_megatron.files import atomic_write
from collab_megatron.types import Message, Task

T = TypeVar("T")
MUST_END = "must end with a user turn, which the policy answers"

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
PAIR_SCHEMA = pa.schema([("conv_id", pa.string()), ("prompt", MESSAGES), ("chosen", MESSAGES), ("rejected", MESSAGES)])


@dataclass(frozen=True)
class Conversation:
    """One SFT row: a chat that ends with an assistant turn."""

    conv_id: str
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Pair:
    """One DPO row: two continuations of one chat, of which the first is better.

    Example: Pair("7", (Message("user", "Book a room."),), (Message("assistant", "For when?"),),
    (Message("assistant", "Done."),))
    """

    conv_id: str
    prompt: tuple[Message, ...]  # ends with a user turn
    chosen: tuple[Message, ...]  # begins and ends with an assistant turn
    rejected: tuple[Message, ...]  # as chosen


def write_tasks(path: Path, tasks: Iterable[Task]) -> int:
    """Write RL tasks; returns how many."""
    rows = [
        {
            "task_id": task.task_id,
            "prompt": [message.as_dict() for message in task.prompt],
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
    """RL tasks as written by prepare_dataset.py. Raises UserError for the first wrong rows, after a check of all."""
    return _read(Path(path), TASK_SCHEMA, "rl", _to_tasks)


def read_task_files(files: Sequence[Path]) -> tuple[list[Task], int]:
    """RL tasks of all files, in order, and the number left out because an earlier file has the same task.

    Raises UserError as read_tasks does, and if two files use one task_id for different tasks.
    """
    by_file = {file: read_tasks(file) for file in files}
    _refuse_shared_ids(by_file)
    return _join(by_file.values(), lambda task: (task.task_id, task.prompt, task.single_turn_prompt))


def write_conversations(path: Path, conversations: Iterable[Conversation]) -> int:
    """Write SFT conversations; returns how many."""
    rows = [
        {"conv_id": row.conv_id, "messages": [message.as_dict() for message in row.messages]} for row in conversations
    ]
    _write(path, rows, CONVERSATION_SCHEMA)
    return len(rows)


def read_conversations(path: str | Path) -> list[Conversation]:
    """SFT conversations as written by prepare_dataset.py. Raises UserError as read_tasks does."""
    return _read(Path(path), CONVERSATION_SCHEMA, "sft", _to_conversations)


def read_conversation_files(files: Sequence[Path]) -> tuple[list[Conversation], int]:
    """SFT conversations of all files, in order, and the number left out because an earlier file has the same chat.

    Messages are compared, not conv_ids, which count from 0 in every dataset. Raises UserError as read_conversations.
    """
    return _join((read_conversations(file) for file in files), lambda row: row.messages)


def write_pairs(path: Path, pairs: Iterable[Pair]) -> int:
    """Write DPO pairs; returns how many."""
    chats = ("prompt", "chosen", "rejected")
    rows = [
        {"conv_id": pair.conv_id, **{name: [turn.as_dict() for turn in getattr(pair, name)] for name in chats}}
        for pair in pairs
    ]
    _write(path, rows, PAIR_SCHEMA)
    return len(rows)


def read_pairs(path: str | Path) -> list[Pair]:
    """DPO pairs as written by prepare_dataset.py. Raises UserError as read_tasks does."""
    return _read(Path(path), PAIR_SCHEMA, "dpo", _to_pairs)


def read_pair_files(files: Sequence[Path]) -> tuple[list[Pair], int]:
    """DPO pairs of all files, in order, and the number left out because an earlier file has the same texts.

    Raises UserError as read_pairs.
    """
    return _join((read_pairs(file) for file in files), lambda row: (row.prompt, row.chosen, row.rejected))


def _to_tasks(columns: ParquetColumns) -> list[Task]:
    """Tasks of the columns. Problems: empty texts, a chat that does not end with a user turn, one id for two tasks."""
    ids, wishes = columns.texts("task_id"), columns.texts("single_turn_prompt")
    prompts = columns.chats("prompt")
    for name, values in (("task_id", ids), ("single_turn_prompt", wishes)):
        columns.note_where(name, values, lambda text: not text.strip(), "is empty")
    columns.note_where(
        "prompt",
        prompts,
        lambda chat: any(turn.role not in ROLES for turn in chat),
        f"has a role that is none of {', '.join(ROLES)}",
    )
    columns.note_where("prompt", prompts, lambda chat: bool(chat) and chat[-1].role != "user", MUST_END)
    columns.note_where(
        "prompt", prompts, lambda chat: bool(chat) and not (chat[-1].content or "x").strip(), "ends with an empty turn"
    )
    first: dict[str, int] = {}
    for row, task_id in enumerate(ids):
        held = first.setdefault(task_id, row)
        if held != row and (prompts[held], wishes[held]) != (prompts[row], wishes[row]):
            columns.note(row, f"task_id {task_id!r} is also the id of row {held + 1}, a different task")
    truths, descriptions = columns.texts("ground_truth"), columns.texts("task_desc", required=False)
    return list(map(Task, ids, prompts, wishes, truths, descriptions, columns.mappings("metadata_json")))


def _to_conversations(columns: ParquetColumns) -> list[Conversation]:
    return list(map(Conversation, columns.texts("conv_id"), columns.chats("messages")))


def _to_pairs(columns: ParquetColumns) -> list[Pair]:
    """Pairs of the columns. Problems: a prompt without a last user turn, a reply that is no assistant turn or is empty,
    two equal replies."""
    prompts, replies = columns.chats("prompt"), {name: columns.chats(name) for name in ("chosen", "rejected")}
    columns.note_where("prompt", prompts, lambda chat: bool(chat) and chat[-1].role != "user", MUST_END)
    for name, chats in replies.items():
        columns.note_where(
            name,
            chats,
            lambda chat: bool(chat) and {chat[0].role, chat[-1].role} != {"assistant"},
            "must begin and end with an assistant turn",
        )
        columns.note_where(
            name, chats, lambda chat: bool(chat) and not (chat[0].content or "x").strip(), "begins with an empty turn"
        )
    for row, (chosen, rejected) in enumerate(zip(replies["chosen"], replies["rejected"], strict=True)):
        if chosen and chosen == rejected:
            columns.note(row, "chosen and rejected are equal, so the pair teaches nothing")
    return list(map(Pair, columns.texts("conv_id"), prompts, replies["chosen"], replies["rejected"]))


def _write(path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
    with atomic_write(path) as temporary:
        pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), temporary)


def _read(path: Path, schema: pa.Schema, kind: str, convert: Callable[[ParquetColumns], list[T]]) -> list[T]:
    """All rows; all are checked before one is refused."""
    if not path.is_file():
        raise UserError(f"there is no file {path}: write it with tools/prepare_dataset.py --dataset-type {kind}")
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{path} cannot be read as parquet: {error}; write it again with "
            f"tools/prepare_dataset.py --dataset-type {kind}"
        ) from None
    for name in schema.names:
        if name not in table.column_names:
            raise UserError(
                f"{path} has no column {name!r}, but {', '.join(table.column_names)}: "
                f"write it with tools/prepare_dataset.py --dataset-type {kind}"
            )
    if table.num_rows == 0:
        raise UserError(f"{path} holds no rows: write it with tools/prepare_dataset.py --dataset-type {kind}")
    columns = ParquetColumns(path, table.select(schema.names))
    rows = convert(columns)
    columns.refuse(kind)
    return rows


def _refuse_shared_ids(by_file: Mapping[Path, Sequence[Task]]) -> None:
    first: dict[str, tuple[Task, Path]] = {}
    for file, tasks in by_file.items():
        for task in tasks:
            held, other = first.setdefault(task.task_id, (task, file))
            if other != file and (held.prompt, held.single_turn_prompt) != (task.prompt, task.single_turn_prompt):
                raise UserError(
                    f"task_id {task.task_id!r} names different tasks in {other} and {file}: write both files with "
                    "tools/prepare_dataset.py, which derives ids from the contents, or give the tasks other ids"
                )


def _join(files: Iterable[Sequence[T]], identity: Callable[[T], Hashable]) -> tuple[list[T], int]:
    """Concatenate files without rows that an earlier file has. Repeated rows within a file stay, as a weight."""
    rows: list[T] = []
    seen: set[Hashable] = set()
    repeated = 0
    for here in files:
        fresh = [row for row in here if identity(row) not in seen]
        repeated += len(here) - len(fresh)
        seen.update(identity(row) for row in fresh)
        rows += fresh
    return rows, repeated
