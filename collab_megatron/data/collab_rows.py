"""CollabLLM rows as typed values: one row per (conversation, turn, candidate reply), from any of three forms.

flat form      the same fields as CollabRow
nested form    {single_turn_prompt, ..., turns: [{prompt, responses: [{completion, score, sessions, rewards}]}]}
messages form  {messages: [{role, content}, ...]}: a finished chat, for supervised training only

docs/data.md describes every column.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from collab_megatron.data.bad_rows import BadRows
from collab_megatron.data.sessions import Futures, read_futures, session_scores
from collab_megatron.errors import UserError
from collab_megatron.types import Message

FLAT_COLUMNS = ("prompt", "completion", "conv_id", "single_turn_prompt")
NESTED_COLUMNS = ("single_turn_prompt", "turns")
ROLES = ("system", "user", "assistant")
SHOWN_ROWS = 5


@dataclass(frozen=True)
class CollabRow:
    """One candidate reply at one turn of one conversation."""

    prompt: tuple[Message, ...]  # the chat so far; ends with a user turn
    completion: str
    conv_id: str
    turn_id: int  # larger is later; if the row has none: user turns before the last one
    single_turn_prompt: str  # in the messages form, which has no task: the first user turn
    single_turn_completion: str = ""
    ground_truth: str = ""
    task_desc: str = ""
    score: float | None = None  # MR; None: not scored
    rewards: Mapping[str, float] = field(default_factory=dict)  # metric -> mean over the sessions
    futures: Futures | None = ()  # the turns after the completion in each session; None: of an unknown form
    metadata: Mapping[str, Any] = field(default_factory=dict)  # single_turn_metadata
    has_task: bool = True  # False in the messages form: its user cannot be simulated

    @property
    def conversation(self) -> tuple[str, str]:
        """Identity of a conversation, also across files or splits that each count their conv_ids from 0."""
        return self.conv_id, self.single_turn_prompt


def parse_rows(raw: Iterable[Mapping[str, Any]], source: str, bad: BadRows | None = None) -> list[CollabRow]:
    """Rows of any form. Error messages count rows from 1.

    Raises UserError with source, row and column of unreadable rows, after a check of all rows, unless `bad` skips such
    rows; in any case if no row is left.
    """
    bad = bad or BadRows()
    listed = list(raw)
    lacking = {number: missing for number, row in enumerate(listed) if (missing := _missing_columns(row))}
    if lacking and (not bad.skip or len(lacking) == len(listed)):
        raise UserError(_lacks(lacking, listed, source))
    rows: list[CollabRow] = []
    wrong: list[str] = []
    for number, row in enumerate(listed):
        where = f"{source}: row {number + 1}"
        try:
            if not isinstance(row, Mapping):
                raise UserError(f"{where} is a {type(row).__name__}, but must be a mapping of columns")
            if number in lacking:
                raise UserError(f"{where} has no {', '.join(lacking[number])}")
            rows += _read_row_of_any_form(row, number, where)
            bad.read += 1
        except UserError as error:
            wrong.append(str(error))
    if wrong:
        bad.found_all(wrong)
    if not rows:
        first = f" that can be read; the first: {bad.reasons[0]}" if bad.reasons else ""
        raise UserError(f"{source} holds no rows{first}")
    return rows


def _form(row: Mapping[str, Any]) -> str:
    """flat, nested or messages. In parquet, columns of other rows are null."""
    if row.get("turns") is not None:
        return "nested"
    if row.get("messages") is not None and row.get("prompt") is None:
        return "messages"
    return "flat"


def _missing_columns(row: Any) -> tuple[str, ...]:
    if not isinstance(row, Mapping):
        return ()
    needed = {"flat": FLAT_COLUMNS, "nested": NESTED_COLUMNS, "messages": ()}[_form(row)]
    return tuple(column for column in needed if column not in row)


def _lacks(lacking: Mapping[int, Sequence[str]], rows: Sequence[Any], source: str) -> str:
    """One sentence with all missing columns, each with the rows that lack it."""
    by_column: dict[str, list[int]] = {}
    for number, missing in lacking.items():
        for column in missing:
            by_column.setdefault(column, []).append(number + 1)
    parts = []
    for column, numbers in by_column.items():
        if len(numbers) == len(rows):
            parts.append(repr(column))
        else:
            more = ", ..." if len(numbers) > SHOWN_ROWS else ""
            shown = ", ".join(map(str, numbers[:SHOWN_ROWS])) + more
            parts.append(f"{column!r} in {len(numbers):,} of {len(rows):,} rows ({shown})")
    columns = ", ".join(dict.fromkeys(str(name) for number in lacking for name in rows[number]))
    noun = "column" if len(parts) == 1 else "columns"
    return f"{source} has no {noun} {', '.join(parts)}; its columns are {columns}; docs/data.md describes the forms"


def _read_row_of_any_form(row: Mapping[str, Any], number: int, where: str) -> list[CollabRow]:
    form = _form(row)
    if form == "messages":
        return [_read_messages_row(row, number, where)]
    return [_read_row(flat, where) for flat in (_flatten(row, number, where) if form == "nested" else (row,))]


def _read_messages_row(row: Mapping[str, Any], number: int, where: str) -> CollabRow:
    messages = _messages(row["messages"], f"{where}: messages")
    if len(messages) < 2 or (messages[-2].role, messages[-1].role) != ("user", "assistant"):
        raise UserError(f"{where}: messages must end with a user turn and the assistant turn that answers it")
    conv_id = row.get("conv_id")
    return CollabRow(
        prompt=messages[:-1],
        completion=messages[-1].content,
        conv_id=_text(str(number if conv_id is None else conv_id), f"{where}: conv_id"),
        turn_id=_user_turns(messages) - 1,
        single_turn_prompt=next(message.content for message in messages if message.role == "user"),
        has_task=False,
    )


def _flatten(row: Mapping[str, Any], number: int, where: str) -> Iterator[Mapping[str, Any]]:
    shared = {name: value for name, value in row.items() if name != "turns"}
    shared.setdefault("conv_id", number)
    turns = _list(row["turns"], f"{where}: turns")
    if all(turn.get("responses") == [] for turn in turns):  # else the row would be lost without a message
        raise UserError(f"{where}: turns have no response: add at least one, or remove the row")
    for turn_id, turn in enumerate(turns):
        for response in _list(turn.get("responses"), f"{where}: turns[{turn_id}].responses"):
            yield {**shared, "prompt": turn.get("prompt"), "turn_id": turn_id, "completion": None, **response}


def _read_row(row: Mapping[str, Any], where: str) -> CollabRow:
    prompt = _messages(row["prompt"], f"{where}: prompt")
    if prompt[-1].role != "user":
        raise UserError(f"{where}: prompt must end with a user turn, but ends with a turn of {prompt[-1].role!r}")
    if not prompt[-1].content.strip():
        raise UserError(f"{where}: prompt ends with an empty user turn")
    if row["conv_id"] is None:
        raise UserError(f"{where}: conv_id is empty")
    task = _text(row["single_turn_prompt"], f"{where}: single_turn_prompt")
    if not task.strip():
        raise UserError(f"{where}: single_turn_prompt is empty, but the simulated user needs it")
    turn_id = _whole(row.get("turn_id"), f"{where}: turn_id")
    return CollabRow(
        prompt=prompt,
        completion=_text(row.get("completion"), f"{where}: completion"),
        conv_id=_text(str(row["conv_id"]), f"{where}: conv_id"),
        turn_id=_user_turns(prompt) - 1 if turn_id is None else turn_id,
        single_turn_prompt=task,
        single_turn_completion=_text(row.get("single_turn_completion") or "", f"{where}: single_turn_completion"),
        ground_truth=_text(row.get("ground_truth") or "", f"{where}: ground_truth"),
        task_desc=_text(row.get("task_desc") or "", f"{where}: task_desc"),
        score=_number(row.get("score"), f"{where}: score"),
        rewards=_rewards(row.get("rewards") or session_scores(row.get("sessions")), f"{where}: rewards"),
        futures=_futures(row.get("sessions"), prompt, str(row.get("completion"))),
        metadata=_metadata(row.get("single_turn_metadata"), f"{where}: single_turn_metadata"),
    )


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    turns = [Message(str(t["role"]), t["content"]) for t in _list(value, where) if "role" in t and "content" in t]
    if not turns or len(turns) != len(value):
        raise UserError(f"{where} must be a list of {{role, content}} with at least one entry")
    for turn in turns:
        if turn.role not in ROLES or not isinstance(turn.content, str):
            raise UserError(f"{where}: roles must be among {', '.join(ROLES)}, and contents must be text")
        _text(turn.content, where)
    return tuple(turns)


def _list(value: Any, where: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise UserError(f"{where} must be a list of mappings")
    return value


def _mapping(value: Any, where: str) -> dict[str, Any]:
    """A mapping, or one as JSON text. Null values are left out: in parquet they are columns of other rows."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):  # no JSON, a number of over 4,300 digits, nested too deeply
            raise UserError(f"{where} is text, but must be a mapping or JSON") from None
    if not value:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{where} must be a mapping")
    return {str(name): item for name, item in value.items() if item is not None}


def _metadata(value: Any, where: str) -> dict[str, Any]:
    """As _mapping, in values that JSON has: dates and other values of parquet become text."""
    found = _mapping(value, where)
    try:
        text = json.dumps(found, ensure_ascii=False, default=str)
    except (ValueError, RecursionError) as error:  # circular, or nested too deeply
        raise UserError(f"{where} cannot be written as JSON: {error}") from None
    _text(text, where)
    plain: dict[str, Any] = json.loads(text)
    return plain


def _rewards(value: Any, where: str) -> dict[str, float]:
    rewards = {}
    for metric, item in _mapping(value, where).items():
        items = item if isinstance(item, list) else [item]
        numbers = [n for n in (_number(one, f"{where}.{metric}") for one in items) if n is not None]
        if numbers:
            rewards[metric] = sum(numbers) / len(numbers)
    return rewards


def _futures(value: Any, prompt: Sequence[Message], completion: str) -> Futures | None:
    """None for an unknown form. Sessions are counted (statistics.py) and not trained, so they refuse no row."""
    try:
        return read_futures(value, prompt, completion)
    except ValueError:
        return None


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where} must be text, but is {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can hold half of a surrogate pair, UTF-8 cannot
        raise UserError(f"{where} has half of a surrogate pair at position {error.start}: remove it") from None
    return value


def _number(value: Any, where: str) -> float | None:
    """None for null and for NaN, which tables of numbers use for it."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{where} must be a number, but is {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        bits = int(value).bit_length()  # no float overflows
        raise UserError(f"{where} is a whole number of {bits} bits, too large for a number here") from None
    if math.isinf(number):
        raise UserError(f"{where} must be a finite number, but is {number}")
    return None if math.isnan(number) else number


def _whole(value: Any, where: str) -> int | None:
    number = _number(value, where) if isinstance(value, float) else value
    if number is None:
        return None
    if isinstance(number, bool) or not isinstance(number, (int, float)) or number != int(number):
        raise UserError(f"{where} must be a whole number, but is {type(value).__name__} {value!r}")
    return int(number)


def _user_turns(messages: Sequence[Message]) -> int:
    return sum(message.role == "user" for message in messages)
