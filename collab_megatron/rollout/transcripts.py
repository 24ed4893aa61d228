"""Every conversation of an evaluation as JSON lines, in the format of the record (docs/record.md).

    RUN_DIR/evaluations/NAME/step_00000040.jsonl          a second driver process: step_00000040.shard1.jsonl

A file is written aside and renamed. An evaluation that is made again replaces its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from collab_megatron.errors import RunError
from collab_megatron.files import publish_text
from collab_megatron.rollout.record import held_out_line
from collab_megatron.types import Group

_NAME = re.compile(r"step_(\d{8})(\.shard\d+)?\.jsonl")


def transcript_file(folder: Path, step: int, shard: int) -> Path:
    """Where the conversations of one evaluation during training lie."""
    return folder / f"step_{step:08d}{f'.shard{shard}' if shard else ''}.jsonl"


def write_transcripts(path: Path, step: int, groups: Sequence[Group]) -> None:
    """Replace `path` by the conversations of `step`. Raises RunError when the disk refuses."""
    publish_text(path, b"".join(held_out_line(step, group) for group in groups).decode())


def keep_newest(folder: Path, keep: int, shard: int, *, step: int) -> None:
    """Remove this shard's older files: the newest `keep` stay, and the first of all, the yardstick of the others.

    Those of steps after `step`, the newest of this attempt, are of an earlier attempt of the run and go too: else
    they would count as the newest. Raises RunError when the disk refuses."""
    own = f".shard{shard}" if shard else None
    files = sorted(file for file in folder.glob("step_*") if (name := _NAME.fullmatch(file.name)) and name[2] == own)
    later = [file for file in files if int(file.name[len("step_") :][:8]) > step]
    own_files = files[: len(files) - len(later)]
    try:
        for file in [*own_files[1:-keep], *later]:
            file.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"cannot remove old transcripts in {folder}: {error.strerror}") from None
