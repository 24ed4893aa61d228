"""Finds what can be viewed in a run's folder: the records of training and the transcripts of evaluations.

    RUN_DIR/conversations/NAME/shard*.jsonl[.zst]     training
    RUN_DIR/evaluations/NAME/step_*.jsonl             evaluations during training
    RUN_DIR/evaluations/NAME/MODEL.jsonl              python -m collab_megatron.evaluate
    RUN_DIR/*.jsonl                                   likewise, where `output` names a file there

A folder of one record and a single .jsonl file are accepted too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collab_megatron.errors import UserError
from collab_megatron.json_lines import row_of
from collab_megatron.rollout.record_files import read_trees

SCHEMA = 1
"""The newest form of record that the viewer knows (docs/record.md)."""
TREE_FIELDS = ("task_id", "prompt", "replies")  # every line of a record has them; the figures of an evaluation do not


@dataclass(frozen=True)
class Source:
    """A record or a transcript.

    Example: Source(Path("runs/x/conversations/rl"), "rl", held_out=False)
    """

    path: Path
    name: str
    held_out: bool  # conversations of an evaluation

    def trees(self) -> Iterator[dict[str, Any]]:
        """Its lines, as docs/record.md describes them. Raises UserError for a damaged or unknown line."""
        for tree in read_trees(self.path) if self.path.is_dir() else _lines(self.path):
            schema = tree.get("schema")
            if not isinstance(schema, int) or schema > SCHEMA:
                raise UserError(
                    f"{self.path} has lines of schema {str(schema)[:20]}, this viewer knows {SCHEMA}: use the "
                    "version of collab_megatron that wrote them"
                )
            yield tree


def find_sources(run: Path) -> list[Source]:
    """Everything in `run` that can be viewed, training first. Raises UserError if there is nothing."""
    if not run.exists():
        raise UserError(f"there is no run folder {run}: check the path")
    if run.is_file():
        return [Source(run, run.stem, held_out=True)]
    if any(run.glob("shard*.jsonl*")):
        return [Source(run, run.name, held_out=False)]
    records = sorted(path for path in run.glob("conversations/*") if any(path.glob("shard*.jsonl*")))
    files = sorted(path for path in (*run.glob("evaluations/*/*.jsonl"), *run.glob("*.jsonl")) if _holds_trees(path))
    found = [Source(path, path.name, held_out=False) for path in records]
    found += [
        Source(path, path.stem if path.parent == run else f"{path.parent.name}/{path.stem}", held_out=True)
        for path in files
    ]
    if not found:
        raise UserError(
            f"{run} holds no conversations: name a run.dir with conversations/ or evaluations/, a folder of "
            "shard*.jsonl, or a transcript (.jsonl)"
        )
    return found


def _holds_trees(path: Path) -> bool:
    """Whether the first line is a tree: the figures of evaluations are JSON lines too."""
    first = next(_lines(path), None)
    return first is not None and all(field in first for field in TREE_FIELDS)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file, one at a time; an unfinished last line is skipped."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n") and line.strip():
                    yield row_of(line, path, number)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
