"""Turns a validation error of pydantic into one sentence: the key, the value and what to write."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from collab_megatron.errors import masked

NEAR = 0.7
"""Similarity (difflib's ratio) from which an unknown key is taken for a typo of a known one."""
SHOWN = 60  # characters of a value
REMOVED = {
    "engine.wait_s": "it is 3 times engine.startup_timeout_s",
    "engine.work_timeout_s": "engine.health_timeout_s is the deadline of a batch too, on CPU 6 times it",
    "engine.request_timeout_s": "it is 1.5 times driver.future_timeout_s; in evaluate half of evaluation.timeout_s, at "
    "least 900 s",
    "json_mode": "for false write response_format: text (true is the default)",
    "json_schema": "for true write response_format: json_schema (false is the default)",
    "rollout.step_timeout_s": "it is 1.5 times driver.future_timeout_s, plus driver.group_timeout_s",
}
"""Keys of earlier versions (or the ends of keys), and their replacement."""


def explain(kind: type[BaseModel], error: ValidationError) -> str:
    """The first error and the number of others. Unknown keys come first: a missing key may be their correct name."""
    found = error.errors(include_url=False, include_input=True)
    found.sort(key=lambda one: one["type"] != "extra_forbidden")
    first, *more = found
    return _sentence(kind, first) + (f" (and {len(more)} more)" if more else "")


def shown(value: Any) -> str:
    """A value in YAML, shortened; for a list or mapping only its kind."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict | list | tuple):
        return "a mapping" if isinstance(value, dict) else "a list"
    return cut(repr(value))


def cut(text: str) -> str:
    """The beginning of the text; masked first, because a shortened address is not recognized."""
    text = masked(text)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _sentence(kind: type[BaseModel], first: Any) -> str:
    loc, value, reason = first["loc"], first["input"], first["type"]
    dotted = ".".join(str(part) for part in loc)
    if reason == "extra_forbidden":
        if successor := next((text for key, text in REMOVED.items() if f".{dotted}".endswith(f".{key}")), None):
            return f"the key {dotted!r} was removed: {successor}; remove the line"
        known = _keys_at(kind, loc[:-1])
        near = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=NEAR)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys here: {', '.join(sorted(known))}"
        return f"unknown key {dotted!r}; {hint}"
    if reason == "missing":
        return f"{dotted!r} is not set and has no default: set it"
    if reason == "value_error":
        return f"{dotted}: {first['ctx']['error']}" if dotted else str(first["ctx"]["error"])
    if reason == "invalid_key":
        return (
            f"a key in {'.'.join(map(str, loc[:-1])) or 'the config'!r} is {shown(value)}: a key must be text: quote it"
        )
    if reason in ("model_type", "model_attributes_type", "dict_type"):
        if value is None:
            return f"{dotted!r} is empty: remove the line, or write its keys below it"
        return f"{dotted!r} is a section, a mapping of keys, not {shown(value)}: write its keys below it"
    if reason in ("tuple_type", "list_type"):
        return f"{dotted!r} is a list, not {shown(value)}: write its entries in [ ]"
    if reason == "string_type" and not isinstance(value, dict | list | tuple):
        return f"{dotted!r} should be a string (got {shown(value)}): quote it"
    if reason == "string_too_short":
        return f"{dotted!r} is empty: write a text, such as a name"
    if reason in ("bool_type", "bool_parsing"):
        return f"{dotted!r} should be true or false (got {shown(value)})"
    return f"{dotted!r}: {first['msg'][:1].lower()}{first['msg'][1:]} (got {shown(value)})"


def _keys_at(kind: type[BaseModel], loc: Sequence[int | str]) -> list[str]:
    """The keys of the section at `loc`."""
    node: Any = kind
    for part in loc:
        if typing.get_origin(node) in (dict, tuple):  # {name: section} or (section, ...)
            node = next(a for a in reversed(typing.get_args(node)) if a is not Ellipsis)
            continue
        annotation = node.model_fields[part].annotation
        if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
            annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
        node = annotation
    return list(node.model_fields)
