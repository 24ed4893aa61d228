"""Rows of any single-turn dataset as the columns of a problem (config/sections/problems.py). Pure.

A value of a row is only ever inserted into a template, never expanded or evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from collab_megatron.config.sections import ColumnTemplate, MappingSection
from collab_megatron.errors import UserError

Row = Mapping[str, Any]
Rows = list[tuple[int, Any]]  # (place in the dataset, row)


def wanted_rows(rows: Sequence[Any], mapping: MappingSection) -> Rows:
    """The rows that `where` and `largest_first` keep, in their order, with their places. Rows that are no mappings are
    kept, for the reader to refuse. Raises UserError for a column that no row has."""
    for column in (*mapping.where, *([mapping.largest_first] if mapping.largest_first else [])):
        if rows and not any(_value(row, column) is not None for row in rows):
            raise UserError(f"mapping names the column {column!r}, which no row has; {columns_of(rows[0])}")
    kept = [(place, row) for place, row in enumerate(rows) if _matches(row, mapping.where)]
    if mapping.largest_first is None:
        return kept
    column = mapping.largest_first
    ranked = [(_value(row, column), place, row) for place, row in kept if _value(row, column) is not None]
    try:
        ranked.sort(key=lambda item: item[0], reverse=True)
    except TypeError:
        raise UserError(
            f"mapping.largest_first: the values of {column!r} have several types and cannot be sorted: name another "
            "column"
        ) from None
    return [(place, row) for _, place, row in ranked]


def mapped(row: Row, mapping: MappingSection, where: str) -> dict[str, Any]:
    """`row` with the columns of a problem. Raises UserError naming the first column that is missing."""
    found: dict[str, Any] = {
        "single_turn_prompt": _needed(row, mapping.single_turn_prompt, where),
        "single_turn_completion": _needed(row, mapping.single_turn_completion, where),
        "prompt": None if mapping.prompt is None else _filled(row, mapping.prompt),
        "task_desc": mapping.task_desc,
    }
    metadata = {name: _value(row, column) for name, column in mapping.metadata.items()}
    if mapping.ambiguous_where:
        metadata["ambiguous"] = _matches(row, mapping.ambiguous_where)
    found["single_turn_metadata"] = {name: value for name, value in metadata.items() if value is not None}
    return found


def too_long(completion: str, mapping: MappingSection, count_tokens: Callable[[str], int]) -> bool:
    return mapping.max_completion_tokens is not None and count_tokens(completion) > mapping.max_completion_tokens


def columns_of(row: Any) -> str:
    return (
        f"its columns are {', '.join(map(str, row))}" if isinstance(row, Mapping) else f"it is a {type(row).__name__}"
    )


def _needed(row: Row, templates: str | tuple[str, ...], where: str) -> str:
    text = _filled(row, templates)
    if text is None:
        last = templates if isinstance(templates, str) else templates[-1]
        missing = next(name for name in ColumnTemplate(last).columns() if _text(row, name) is None)
        raise UserError(f"{where} has no text {missing!r} for the mapping's {last!r}; {columns_of(row)}")
    return text


def _filled(row: Row, templates: str | tuple[str, ...]) -> str | None:
    """The text of the first template whose values are all there."""
    for text in (templates,) if isinstance(templates, str) else templates:
        template = ColumnTemplate(text)
        values = {name: _text(row, name) for name in template.columns()}
        if None not in values.values():
            return template.substitute(values)
    return None


def _text(row: Row, column: str) -> str | None:
    """A value as text; None where there is none, or a list or mapping."""
    value = _value(row, column)
    return None if value is None or isinstance(value, list | Mapping) else str(value)


def _value(row: Any, column: str) -> Any:
    """The value at `column.key.0`; None where it is not there."""
    for part in column.split("."):
        if isinstance(row, Mapping):
            row = row.get(part)
        elif isinstance(row, list) and part.isdecimal() and int(part) < len(row):
            row = row[int(part)]
        else:
            return None
    return row


def _matches(row: Any, where: Mapping[str, Any]) -> bool:
    return not isinstance(row, Mapping) or all(
        _value(row, column) in (wanted if isinstance(wanted, list) else [wanted]) for column, wanted in where.items()
    )
