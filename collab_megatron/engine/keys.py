"""The API keys of a run's SGLang servers: random, in one file of mode 600, never on a command line or in a variable.

    {"api-key": "5f0c...", "admin-api-key": "91ab..."}      JSON, which is YAML too: `sglang --config FILE` reads it

SGLang wants the first for generate calls and read-only calls, the second for every call that changes the server (pause,
weights, caches); /health, /ready and /metrics need no key (sglang/srt/utils/auth.py, 0.5.23).
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from collab_megatron.errors import RunError

API_KEY_CALLS = frozenset({"generate", "model_info", "server_info", "v1/loads", "ping", "health", "ready"})
"""Calls that need the API key, without their query; all others need the admin key."""


@dataclass(frozen=True)
class EngineKeys:
    """Two secrets; `repr` leaves them out."""

    api: str = field(repr=False)
    admin: str = field(repr=False)

    @classmethod
    def new(cls) -> EngineKeys:
        return cls(secrets.token_hex(32), secrets.token_hex(32))

    @property
    def text(self) -> str:
        """The content of the file."""
        return json.dumps({"api-key": self.api, "admin-api-key": self.admin})

    @classmethod
    def read(cls, file: Path) -> EngineKeys:
        """Raises RunError if `file` is missing or is no file of keys."""
        try:
            keys = json.loads(file.read_text())
            return cls(keys["api-key"], keys["admin-api-key"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"the engines' keys cannot be read from {file} ({type(error).__name__})") from None

    def header(self, call: str) -> Mapping[str, str]:
        """The HTTP header of a request for `call` (`generate`, `v1/loads?include=core`)."""
        key = self.api if call.partition("?")[0] in API_KEY_CALLS else self.admin
        return {"Authorization": f"Bearer {key}"}
