"""Replies and policy turns for the journal's tests."""

from __future__ import annotations

import hashlib
from pathlib import Path

from collab_megatron.types import Generation, LLMReply


def key(name: object) -> bytes:
    return hashlib.blake2b(str(name).encode(), digest_size=16).digest()


def reply(text: str = "hello", *, cost_usd: float = 0.25, model: str = "model-a") -> LLMReply:
    return LLMReply((text,), 10, 3, cost_usd, 0.5, model, "fp_1", 1)


def turn(version: int = 5, *, tokens: int = 3) -> Generation:
    logprobs = tuple(-0.1 / (t + 1) for t in range(tokens))
    return Generation(tuple(range(tokens)), logprobs, (version,) * tokens, "stop", cached_tokens=2)


def raw(path: Path) -> bytes:
    """The file and its log, as they lie on the disk."""
    return b"".join(file.read_bytes() for file in sorted(path.parent.glob(path.name + "*")))
