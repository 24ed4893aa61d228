"""RL tasks and SFT conversations on disk: parquet written aside and renamed, read back as typed values.

Chats are lists of {role, content}; metadata is one JSON string per row, since rows of one file may hold different keys.
Nothing that is read is ever evaluated. In messages rows count from 1, as lines do.
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
from collab_megatron.data.parquet_columns import Columns
from collab_megatron.errors import UserError
from collab_megatron.files import atomic_write
from collab_megatron.types import Message, Task

T = TypeVar("T")
MUST_END = "must end with a user turn: the policy answers it"

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
    """RL tasks as prepare_dataset.py wrote them. Raises UserError naming the file and what is wrong with it, over all
    of its rows and with the numbers of the first ones."""
    return _read(Path(path), TASK_SCHEMA, "rl", _to_tasks)


def read_task_files(files: Sequence[Path]) -> tuple[list[Task], int]:
    """RL tasks of all files, in order, and how many were left out because an earlier file holds the same task.

    Raises UserError as read_tasks does, and where two files use one task_id for different tasks.
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
    """SFT conversations as prepare_dataset.py wrote them. Raises UserError naming the file and what is wrong."""
    return _read(Path(path), CONVERSATION_SCHEMA, "sft", _to_conversations)


def read_conversation_files(files: Sequence[Path]) -> tuple[list[Conversation], int]:
    """SFT conversations of all files, in order, and how many were left out because an earlier file holds the same chat.

    conv_ids count from 0 in every dataset: what decides is the messages. Raises UserError as read_conversations does.
    """
    return _join((read_conversations(file) for file in files), lambda row: row.messages)


def _to_tasks(columns: Columns) -> list[Task]:
    """Rows that could not train what they are meant to are noted: a task with nothing to say or to answer, a chat in
    which it is not the policy's turn, one id for two tasks."""
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
            columns.note(row, f"task_id {task_id!r} is that of row {held + 1} too, which is a different task")
    truths, tellings = columns.texts("ground_truth"), columns.texts("task_desc", required=False)
    return list(map(Task, ids, prompts, wishes, truths, tellings, columns.mappings("metadata_json")))


def _to_conversations(columns: Columns) -> list[Conversation]:
    return list(map(Conversation, columns.texts("conv_id"), columns.chats("messages")))


def _write(path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
    with atomic_write(path) as temporary:
        pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), temporary)


def _read(path: Path, schema: pa.Schema, kind: str, convert: Callable[[Columns], list[T]]) -> list[T]:
    """All rows; every row is looked at before any is refused."""
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
    columns = Columns(path, table.select(schema.names))
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
