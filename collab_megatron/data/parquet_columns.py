"""A parquet file's columns as Python values. Problems are recorded by row over the whole file, then raised together.

Columns are read as a whole, chats as flattened roles and contents. A million rows take 15 s of CPU with all checks; one
mapping per row took 30 s without checks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from collab_megatron.errors import UserError
from collab_megatron.types import Message

SHOWN = 3  # rows with their problem in one sentence
A_CHAT = "a chat is a list of {role, content} with at least one entry"


class ParquetColumns:
    """The columns of one table, and its unusable rows."""

    def __init__(self, path: Path, table: pa.Table) -> None:
        self._path, self._table = path, table
        self.problems: dict[int, str] = {}  # row, counted from 0 -> its first problem

    def note(self, row: int, problem: str) -> None:
        """Record a row's problem; `row` counts from 0."""
        self.problems.setdefault(row, problem)

    def note_where(self, name: str, values: Iterable[Any], wrong: Callable[[Any], bool], problem: str) -> None:
        """Record `problem` of column `name` for each row whose value is `wrong`."""
        for row, value in enumerate(values):
            if wrong(value):
                self.note(row, f"{name} {problem}")

    def texts(self, name: str, *, required: bool = True) -> list[str]:
        """A column of text. null is a problem if `required`, else an empty text. Raises UserError for another type."""
        column = self._table[name]
        values = self._texts(column, name, "values")
        if column.null_count:
            if required:
                self.note_where(name, values, lambda value: value is None, "is null, but must be text")
            values = [value or "" for value in values]
        return values  # type: ignore[return-value]

    def mappings(self, name: str) -> list[dict[str, Any]]:
        """A column of JSON objects as text; null and an empty text are {}."""
        found: list[dict[str, Any]] = []
        for row, text in enumerate(self.texts(name, required=False)):
            value: Any = {}
            try:
                value = json.loads(text) if text else {}
            except (ValueError, RecursionError) as error:
                self.note(row, f"{name} is not JSON ({error})")
            if not isinstance(value, dict):
                self.note(row, f"{name} is JSON, but not an object: {text[:40]!r}")
            found.append(value)
        return found

    def chats(self, name: str) -> list[tuple[Message, ...]]:
        """A column of lists of {role, content}; () for a row without one. Raises UserError for another type."""
        column = self._table[name]
        if pa.types.is_null(column.type):
            column = column.cast(pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])))
        if pa.types.is_fixed_size_list(column.type):
            column = column.cast(pa.list_(column.type.value_type))
        kind = column.type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        item = kind.value_type if is_list else kind
        if not is_list or not pa.types.is_struct(item) or {"role", "content"} - {field.name for field in item}:
            raise UserError(f"{self._path}: column {name} has type {kind}, but {A_CHAT}")
        found: list[tuple[Message, ...]] = []
        for chunk in column.chunks:
            turns = chunk.flatten()
            roles = self._texts(pc.struct_field(turns, "role"), name, "roles")
            contents = self._texts(pc.struct_field(turns, "content"), name, "contents")
            start = 0
            for length in pc.list_value_length(chunk).to_pylist():
                if not length:
                    self.note(len(found), f"{name} is {'null' if length is None else 'empty'}: {A_CHAT}")
                end = start + (length or 0)
                found.append(tuple(map(Message, roles[start:end], contents[start:end])))  # type: ignore[arg-type]
                start = end
            if None in roles or None in contents:
                self._note_nulls(name, found)
        return found

    def refuse(self, kind: str) -> None:
        """Raises UserError if a row has a problem, with the number of such rows and the first ones, counted from 1."""
        if not self.problems:
            return
        rows = sorted(self.problems)
        shown = "; ".join(f"row {row + 1}: {self.problems[row]}" for row in rows[:SHOWN])
        more = f"; and {len(rows) - SHOWN:,} more" if len(rows) > SHOWN else ""
        raise UserError(
            f"{self._path}: {len(rows):,} of {self._table.num_rows:,} rows do not have the {kind} form: {shown}{more}; "
            f"write the file with tools/prepare_dataset.py --dataset-type {kind}"
        )

    def _texts(self, column: Any, name: str, what: str) -> list[str | None]:
        """An array of text, unchanged. Raises UserError for another type, or for bytes that are not UTF-8."""
        kind = column.type
        if pa.types.is_dictionary(kind):
            column, kind = column.cast(kind.value_type), kind.value_type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
            raise UserError(f"{self._path}: column {name} has {what} of type {kind}, but they must be text (string)")
        try:
            values: list[str | None] = column.to_pylist()
        except UnicodeDecodeError as error:
            raise UserError(f"{self._path}: column {name} has {what} that are not UTF-8: {error}") from None
        return values

    def _note_nulls(self, name: str, chats: Iterable[tuple[Message, ...]]) -> None:
        for row, chat in enumerate(chats):
            for turn in chat:
                for part in ("role", "content"):
                    if getattr(turn, part) is None:
                        self.note(row, f"{name} has a turn whose {part} is null, but must be text")
