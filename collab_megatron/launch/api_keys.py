"""Which processes of a run see the keys of LLM APIs: the drivers, which call them. Servers and trainer ranks do not."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from pydantic import BaseModel

SUFFIX = "_API_KEY"
"""A variable that ends so is a key, whether the config names it or not."""


def key_variables(config: BaseModel, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Names of the variables with keys: those that an api_key_env of the config names, and by SUFFIX."""
    named = set(_named(config.model_dump()))
    return tuple(sorted(named | {name for name in environment if name.upper().endswith(SUFFIX)}))


def _named(value: object) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key == "api_key_env" and isinstance(inner, str):
                yield inner
            else:
                yield from _named(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _named(inner)
