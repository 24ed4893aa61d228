"""Checks `extra`, the additional arguments of an LLM call, which go to litellm.acompletion unchanged.

A config is copied into logs, checkpoints and TensorBoard, so it must not contain a secret. Arguments that other keys
set are refused too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from collab_megatron.errors import MASK, masked

# argument -> the key that sets it
OWN: Mapping[str, str] = {
    "model": "model",
    "messages": "prompt_file",
    "temperature": "temperature",
    "max_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "n": "rollout or build settings: replies are counted there",
    "seed": "run.seed: each call gets one of its own",
    "timeout": "timeout_s",
    "request_timeout": "timeout_s",
    "max_retries": "max_attempts",
    "num_retries": "max_attempts",
    "fallbacks": "deployments",
    "api_base": "api_base",
    "base_url": "api_base",
    "response_format": "response_format",
    "stream": "nothing: replies are read whole",
    "mock_response": "nothing: it would answer without a model",
    "input_cost_per_token": "input_usd_per_mtoken",
    "output_cost_per_token": "output_usd_per_mtoken",
}
SECRET_WORDS = frozenset(
    {
        *("key", "keys", "apikey", "token", "secret", "secrets", "password", "passwd", "credential", "credentials"),
        *("auth", "authorization", "bearer", "cookie", "header", "headers", "pwd"),
        *("accesskey", "secretkey", "accesstoken", "apitoken", "authtoken"),
    }
)
NO_SECRETS = frozenset({"prompt_cache_key"})  # harmless names with such a word
KEY_LIKE = re.compile(
    r"(?i:bearer\s+\S|sk-|pk-|rk-|gsk_|xai-|hf_|gh[pousr]_|AKIA|AIza|eyJ[\w-]{8,}\.)"  # prefixes of providers' keys
    r"|\w+://[^/@\s]+:[^/@\s]+@"  # an address with a password
    r"|(?=[\w+/=.-]*[a-z])(?=[\w+/=.-]*[A-Z])(?=[\w+/=.-]*\d)[\w+/=.-]{32,}$"  # 32 mixed characters without a space
)


def check_extra(extra: Mapping[str, Any]) -> dict[str, Any]:
    """`extra`, if it is allowed in a config. Raises ValueError with one sentence that quotes no value."""
    for key in extra:
        if key in OWN:
            raise ValueError(f"extra.{key} is set by another key: use {OWN[key]}")
    for path, value in _leaves(extra, "extra"):
        for name in path.split(".")[1:]:
            if name not in NO_SECRETS and SECRET_WORDS & set(_words(name)):
                raise ValueError(_secret(path))
        if isinstance(value, str) and any(map(KEY_LIKE.match, (value, *value.split()))):
            raise ValueError(_secret(path))
    try:
        json.dumps(extra, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError(
            "extra has a value that JSON does not support: use text, numbers, lists and mappings"
        ) from None
    return dict(extra)


def check_address(address: str) -> str:
    """`address`, if it has no user name or password. Raises ValueError with one sentence that masks them."""
    if f"{MASK}@" in shown_address(address):
        raise ValueError(
            f"{shown_address(address)} contains a user name or password, which cannot be sent with an API key: "
            "put the key into an environment variable and name that in api_key_env"
        )
    return address


def shown_address(address: str) -> str:
    """As `masked`, for URLs that may lack the scheme."""
    if "://" in address or "@" not in address:
        return masked(address)
    return f"{MASK}@{address.rpartition('@')[2]}"


def _secret(path: str) -> str:
    return (
        f"{path} looks like a secret, and the config is copied into logs and checkpoints: put it into an environment "
        "variable and name that in api_key_env"
    )


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every value with its dotted path; an empty container counts as a value."""
    children: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(node, Mapping):
        children = iter(node.items())
    elif isinstance(node, list | tuple):
        children = iter(enumerate(node))
    empty = True
    for key, value in children:
        empty = False
        yield from _leaves(value, f"{path}.{key}")
    if empty:
        yield path, node


def _words(name: str) -> list[str]:
    """Lower-case words of `xApiKey`, `api-key` or `api_key`."""
    return re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name).lower().replace("-", " ").replace("_", " ").split()
