"""The keys of a run's SGLang servers: random, in one file of mode 600, on no command line and in no environment.

    {"api-key": "5f0c...", "admin-api-key": "91ab..."}      JSON, which is YAML too: `sglang --config FILE` reads it

SGLang asks for the first at generate calls and questions, for the second at everything that changes it (pause, weights,
caches); /health, /ready and /metrics are open to all (sglang/srt/utils/auth.py, 0.5.23).
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from collab_megatron.errors import RunError
from collab_megatron.files import publish_secret

QUESTIONS = frozenset({"generate", "model_info", "server_info", "v1/loads", "ping", "health", "ready"})
"""Calls that the api key opens, without their query; all others want the admin key."""


@dataclass(frozen=True)
class EngineKeys:
    """Not in any text that is made of it."""

    api: str = field(repr=False)
    admin: str = field(repr=False)

    @classmethod
    def make(cls, file: Path) -> EngineKeys:
        """New ones, written to `file`, which must end in .yaml. Raises RunError when the disk refuses."""
        keys = cls(secrets.token_hex(32), secrets.token_hex(32))
        publish_secret(file, json.dumps({"api-key": keys.api, "admin-api-key": keys.admin}))
        return keys

    @classmethod
    def read(cls, file: Path) -> EngineKeys:
        """Raises RunError if the file is gone or something else."""
        try:
            said = json.loads(file.read_text())
            return cls(said["api-key"], said["admin-api-key"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"the engines' keys cannot be read from {file} ({type(error).__name__})") from None

    def header(self, call: str) -> Mapping[str, str]:
        """What a request for `call` (`generate`, `v1/loads?include=core`) must carry."""
        key = self.api if call.partition("?")[0] in QUESTIONS else self.admin
        return {"Authorization": f"Bearer {key}"}
