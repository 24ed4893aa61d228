"""Single-turn problems: the input of the data engine, from any dataset."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collab_megatron.config.entry import BuildDatasetConfig
from collab_megatron.data.bad_rows import BadRows
from collab_megatron.data.collab_rows import ROLES
from collab_megatron.data.dataset_source import SUFFIXES, load_raw
from collab_megatron.data_engine.mapping import Rows, columns_of, mapped, too_long, wanted_rows
from collab_megatron.data_engine.token_counter import token_counter
from collab_megatron.errors import UserError
from collab_megatron.text import has_half
from collab_megatron.types import Message, Task

NEEDED = ("single_turn_prompt", "single_turn_completion")


@dataclass(frozen=True)
class Problem:
    """One problem; its place in the dataset is the conversation's conv_id."""

    index: int
    task: Task  # its prompt is the opening, if the problem has one


@dataclass(frozen=True)
class Problems:
    """The problems of a build."""

    chosen: list[Problem]
    contents: str  # a hash of the whole dataset, also of rows that num_conversations leaves out
    notices: list[str]  # one line for each reason to leave rows out


def read_problems(config: BuildDatasetConfig) -> Problems:
    """The first `num_conversations` problems of `problems`.

    Raises UserError naming source, problem (counted from 1) and column, unless `on_bad_problem` skips such rows; in any
    case if no problem is left.
    """
    source, mapping, limit = config.problems, config.mapping, config.num_conversations
    if Path(source).suffix in SUFFIXES and not Path(source).is_file():
        raise UserError(f"there is no problems file {source}: set `problems` in the config to a file that exists")
    bad = BadRows(skip=config.on_bad_problem == "skip")
    rows = load_raw(source, config.problems_split, bad, subset=config.problems_subset, option="problems_split")
    wanted = wanted_rows(rows, mapping) if mapping is not None else list(enumerate(rows))
    chosen, long = _choose(wanted, config, limit, bad)
    notices = [notice] if (notice := bad.notice()) else []
    if len(wanted) < len(rows):
        notices.append(f"left out: {len(rows) - len(wanted):,} of {len(rows):,} rows that the mapping does not want")
    if long:
        notices.append(f"left out: {long:,} rows with a reference over mapping.max_completion_tokens")
    if not chosen:
        why = f" that can be used ({'; '.join(notices)})" if notices else ""
        raise UserError(f"{source} holds no problems{why}: write one JSON object per line, or name another dataset")
    return Problems(chosen, _contents(rows, source), notices)


def _choose(wanted: Rows, config: BuildDatasetConfig, limit: int | None, bad: BadRows) -> tuple[list[Problem], int]:
    """The first usable problems, and how many rows before their end have too long a reference."""
    mapping = config.mapping
    counter = token_counter(config.counting_tokenizer) if mapping and mapping.max_completion_tokens else None
    chosen: list[Problem] = []
    long = 0
    for place, row in wanted:
        if limit is not None and len(chosen) >= limit:
            break
        where = f"{config.problems}, problem {place + 1}"
        try:
            if not isinstance(row, Mapping):
                raise UserError(f"{where} is a {type(row).__name__}: write a JSON object")
            problem = _read_problem(place, row if mapping is None else mapped(row, mapping, where), where)
        except UserError as error:
            bad.found(str(error))
            continue
        bad.read += 1
        if mapping is not None and counter is not None and too_long(problem.task.ground_truth, mapping, counter):
            long += 1
        else:
            chosen.append(problem)
    return chosen, long


def _contents(rows: Sequence[Any], source: str) -> str:
    digest = hashlib.sha256()
    for place, row in enumerate(rows):
        try:
            digest.update(json.dumps(row, default=str).encode())
        except (ValueError, TypeError, RecursionError) as error:  # a key that is no text, nested too deeply
            raise UserError(f"{source}, problem {place + 1} cannot be written as JSON: {error}; remove it") from None
    return digest.hexdigest()


def _read_problem(index: int, row: Mapping[str, Any], where: str) -> Problem:
    for column in NEEDED:
        if not isinstance(row.get(column), str):
            raise UserError(f"{where} has no text {column!r}; {columns_of(row)}; `mapping` names other columns")
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
        metadata=_plain(metadata, where),
    )
    texts = (task.single_turn_prompt, task.ground_truth, task.task_desc, *(message.content for message in task.prompt))
    if any(map(has_half, texts)):
        raise UserError(f"{where} contains a lone surrogate (half of a character): remove it")
    return Problem(index, task)


def _plain(metadata: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Metadata in values that JSON has: dates and other values of parquet become text."""
    try:
        text = json.dumps(dict(metadata), default=str)
        plain: dict[str, Any] = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:  # circular, a key that is no text, nested too deeply
        raise UserError(f"{where}: single_turn_metadata cannot be written as JSON: {error}") from None
    return plain


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
    if not all(turn.role in ROLES and isinstance(turn.content, str) for turn in messages):
        raise UserError(f"{where}: prompt has a role that is none of {', '.join(ROLES)}, or a content that is not text")
    if messages[-1].role != "user" or not messages[-1].content.strip():
        raise UserError(f"{where}: prompt must end with a user turn that is not empty")
    return messages
