"""Transcripts: every conversation of an evaluation as JSON lines, in the format of the record (docs/record.md).

    RUN_DIR/evaluations/NAME/step_00000040.jsonl          a second driver process: step_00000040.shard1.jsonl

A file is published whole. A repeated evaluation replaces its file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from collab_megatron.errors import RunError
from collab_megatron.files import publish_text
from collab_megatron.rollout.record_lines import held_out_line
from collab_megatron.types import Group

_NAME = re.compile(r"step_(\d{8})(\.shard\d+)?\.jsonl")


def transcript_file(folder: Path, step: int, shard: int) -> Path:
    """The transcript of one evaluation during training."""
    return folder / f"step_{step:08d}{f'.shard{shard}' if shard else ''}.jsonl"


def write_transcripts(path: Path, step: int, groups: Sequence[Group]) -> None:
    """Write the conversations of `step` to `path`. Raises RunError when the disk refuses."""
    publish_text(path, b"".join(held_out_line(step, group) for group in groups).decode())


def keep_newest(folder: Path, keep: int, shard: int, *, step: int) -> None:
    """Remove this shard's older files, except for the newest `keep` and the very first, the baseline.

    Files of steps after `step`, the newest of this attempt, were left by an earlier attempt and are removed too.
    Raises RunError when the disk refuses."""
    own = f".shard{shard}" if shard else None
    files = sorted(file for file in folder.glob("step_*") if (name := _NAME.fullmatch(file.name)) and name[2] == own)
    later = [file for file in files if int(file.name[len("step_") :][:8]) > step]
    own_files = files[: len(files) - len(later)]
    try:
        for file in [*own_files[1:-keep], *later]:
            file.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(
            f"the driver cannot remove old transcripts in {folder}: {error.strerror}; check the folder's permissions"
        ) from None
