"""Which weights running servers hold: a short name made of their contents, never of where they came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from collab_megatron.engine.control import EngineControl, Refused
from collab_megatron.errors import UserError


def served_weights(urls: Sequence[str], *, timeout_s: float) -> str:
    """16 hex digits, of the servers' own checksums. A server that gives none is taken at its word, the weight version.

    Raises UserError where the servers hold different weights, RunError where one does not answer.
    """
    held, *others = {_held(url, timeout_s) for url in urls}
    if others:
        raise UserError(f"engine.urls: {', '.join(urls)} serve different weights: name servers of one model")
    return hashlib.blake2b(held.encode(), digest_size=8).hexdigest()


def _held(url: str, timeout_s: float) -> str:
    control = EngineControl(url, timeout_s=timeout_s)
    try:
        return json.dumps(control.checksums(), sort_keys=True)
    except Refused:
        return control.weight_version()
    finally:
        control.close()
