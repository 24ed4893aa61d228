"""An API reply as it is kept, and the key by which the same request finds it again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KEY_BYTES = 16


@dataclass(frozen=True)
class RecordedReply:
    """One answered API request, malformed texts included."""

    texts: tuple[str, ...]
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float
    latency_s: float
    model: str = ""  # what the provider says it was (response.model)
    fingerprint: str = ""  # the provider's system_fingerprint
    deployment: int = 0  # index of the role's deployment that answered


def reply_key(
    model: str, messages: Sequence[Mapping[str, str]], parameters: Mapping[str, Any], sample_index: int
) -> bytes:
    """Names a request by its content. `parameters` are what shapes the reply: temperature, max_tokens, n, seed,
    response format; never a key or a header. Raises TypeError or ValueError for what JSON does not have, as NaN."""
    content = [model, [dict(message) for message in messages], dict(parameters), sample_index]
    # ASCII: half a surrogate pair in a text has no UTF-8
    canonical = json.dumps(content, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode("ascii"), digest_size=KEY_BYTES).digest()
