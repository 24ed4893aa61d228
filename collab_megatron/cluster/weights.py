"""Which weights an evaluation is of: a short name made of their contents, never of their path.

What one set of weights said must not be replayed for another, and a folder's weights change under its name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from collab_megatron.engine.control import EngineControl, Refused
from collab_megatron.errors import UserError

WHOLE_BYTES = 64 * 2**20
"""A file up to this size is read whole."""
SAMPLES, SAMPLE_BYTES = 64, 2**20
"""Of a larger one so many stretches are read, spread evenly: an update of the optimizer changes every tensor."""
_DECIDE = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


def folder_name(folder: Path) -> str:
    """16 hex digits for weights, config, tokenizer and template of a model folder. Raises UserError where it cannot be
    read."""
    digest = hashlib.blake2b(digest_size=8)
    try:
        for file in sorted({file for pattern in _DECIDE for file in folder.glob(pattern)}):
            size = file.stat().st_size
            digest.update(f"{file.name}|{size}|".encode())
            with file.open("rb") as content:
                for start, length in _stretches(size):
                    content.seek(start)
                    digest.update(content.read(length))
    except OSError as error:
        raise UserError(f"the model folder {folder} cannot be read: {error.strerror}") from None
    return digest.hexdigest()


def served_name(urls: Sequence[str], folder: Path, *, timeout_s: float) -> str:
    """16 hex digits for the weights that running servers hold, by their own checksums; `folder` gives the tokenizer.

    Raises UserError where the servers hold different weights, RunError where one does not answer. A server that gives
    no checksums is taken at its word: it holds `folder`, as the version that it names.
    """
    held, *others = {_served(url, timeout_s) for url in urls}
    if others:
        raise UserError(f"engine.urls: {', '.join(urls)} serve different weights: name servers of one model")
    return hashlib.blake2b(f"{folder_name(folder)}|{held}".encode(), digest_size=8).hexdigest()


def _served(url: str, timeout_s: float) -> str:
    control = EngineControl(url, timeout_s=timeout_s)
    try:
        return json.dumps(control.checksums(), sort_keys=True)
    except Refused:
        return control.weight_version()
    finally:
        control.close()


def _stretches(size: int) -> list[tuple[int, int]]:
    """(start, length) in bytes."""
    if size <= WHOLE_BYTES:
        return [(0, size)]
    return [(number * (size - SAMPLE_BYTES) // (SAMPLES - 1), SAMPLE_BYTES) for number in range(SAMPLES)]
