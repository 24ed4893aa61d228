"""The values of a config.json by kind: what is missing or of another kind is one sentence that names the key. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from collab_megatron.errors import UserError

SHOWN = 60  # characters of a value


def whole(values: Mapping[str, Any], key: str, default: int | None = None, *, least: int = 1) -> int:
    """A whole number of at least `least`; null counts as missing. Raises UserError."""
    value = _given(values, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1 or value < least:
        raise _other(key, value, f"a whole number of at least {least}")
    return int(value)


def real(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A finite number of at least 0; null counts as missing. Raises UserError."""
    value = _given(values, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise _other(key, value, "a finite number of at least 0")
    return float(value)


def flag(values: Mapping[str, Any], key: str) -> bool:
    """true or false; false where it is missing. Raises UserError."""
    value = _given(values, key, False)
    if not isinstance(value, bool):
        raise _other(key, value, "true or false")
    return value


def mapping(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A mapping; empty where it is missing. Raises UserError."""
    value = _given(values, key, {})
    if not isinstance(value, Mapping):
        raise _other(key, value, "a mapping")
    return value


def names(values: Mapping[str, Any], key: str) -> list[str]:
    """A list of texts; empty where it is missing. Raises UserError."""
    value = _given(values, key, [])
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise _other(key, value, "a list of names")
    return value


def _given(values: Mapping[str, Any], key: str, default: Any) -> Any:
    value = values.get(key)
    value = default if value is None else value
    if value is None:
        raise UserError(f"config.json of the model has no {key!r}: take the whole model folder")
    return value


def _other(key: str, value: Any, wanted: str) -> UserError:
    text = repr(value)
    text = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
    return UserError(f"config.json of the model has {key}={text}, which should be {wanted}: take the model's own file")
