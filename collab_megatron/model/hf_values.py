"""Typed reads of a config.json: a missing or wrong value raises a UserError that names the key. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from collab_megatron.errors import UserError

SHOWN = 60  # characters of a value


def whole(values: Mapping[str, Any], key: str, default: int | None = None, *, least: int = 1) -> int:
    """A whole number, at least `least`; null counts as missing. Raises UserError."""
    value = _given(values, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1 or value < least:
        raise _wrong_type(key, value, f"a whole number, at least {least}")
    return int(value)


def real(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A finite number, at least 0; null counts as missing. Raises UserError."""
    value = _given(values, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise _wrong_type(key, value, "a finite number, at least 0")
    return float(value)


def flag(values: Mapping[str, Any], key: str) -> bool:
    """true or false; false if missing. Raises UserError."""
    value = _given(values, key, False)
    if not isinstance(value, bool):
        raise _wrong_type(key, value, "true or false")
    return value


def mapping(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A mapping; empty if missing. Raises UserError."""
    value = _given(values, key, {})
    if not isinstance(value, Mapping):
        raise _wrong_type(key, value, "a mapping")
    return value


def names(values: Mapping[str, Any], key: str) -> list[str]:
    """A list of strings; empty if missing. Raises UserError."""
    value = _given(values, key, [])
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise _wrong_type(key, value, "a list of names")
    return value


def _given(values: Mapping[str, Any], key: str, default: Any) -> Any:
    value = values.get(key)
    value = default if value is None else value
    if value is None:
        raise UserError(f"the model's config.json has no {key!r}: use the complete model folder")
    return value


def _wrong_type(key: str, value: Any, wanted: str) -> UserError:
    text = repr(value)
    text = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
    return UserError(f"the model's config.json has {key}={text}, but it must be {wanted}: use the original file")
