"""Text published on disk is written aside and renamed: a reader sees the old one or the new one, never half of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from collab_megatron.errors import RunError


def publish_text(path: Path, text: str) -> None:
    """Replace `path` by `text`, making its folder. Raises RunError when the disk refuses."""
    aside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text)
        os.replace(aside, path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from None


def publish_json(path: Path, value: object) -> None:
    """As `publish_text`, indented, keys in the order given."""
    publish_text(path, json.dumps(value, indent=1) + "\n")
