"""tools/prepare_dataset.py: CollabLLM rows to the parquet files that training reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from collab_megatron.data.load import load_rows
from collab_megatron.data.parquet import write_conversations, write_tasks
from collab_megatron.data.rl import rl_tasks
from collab_megatron.data.schema import CollabRow
from collab_megatron.data.sft import sft_conversations
from collab_megatron.data.splits import split_rows
from collab_megatron.errors import UserError

Kind = Literal["sft", "rl"]


@dataclass(frozen=True)
class Shape:
    """How rows become training rows."""

    system_prompt: str = ""
    first_turn_only: bool = False  # RL: openings only
    max_rows: int | None = None  # per file
    metric: str | None = None  # SFT: keep rows whose reward of this name reaches `threshold`
    threshold: float = 0.0


@dataclass(frozen=True)
class Written:
    """One file and what went into it."""

    path: Path
    rows_read: int
    rows_written: int
    conversations: int


def prepare(
    kind: Kind,
    dataset: str,
    output: Path,
    *,
    validation: str | None = None,
    validation_share: float = 0.0,
    seed: int = 1,
    shape: Shape = Shape(),
) -> list[Written]:
    """Write {kind}_train.parquet, and {kind}_validation.parquet where there is held-out data; tell what was written.

    Held-out data is either a dataset of its own or a share of `dataset`, by whole conversations. Raises UserError.
    """
    if validation is not None and validation_share:
        raise UserError("give --validation or --validation-share, not both")
    if shape.max_rows is not None and shape.max_rows < 1:
        raise UserError(f"--max-rows {shape.max_rows}: it takes at least 1")
    rows = load_rows(dataset)
    held_out: Sequence[CollabRow] = ()
    if validation is not None:
        held_out = load_rows(validation)
    elif validation_share:
        rows, held_out = split_rows(rows, validation_share, seed)
    written = [_write(kind, rows, output / f"{kind}_train.parquet", shape)]
    if held_out:
        written.append(_write(kind, held_out, output / f"{kind}_validation.parquet", shape))
    return written


def _write(kind: Kind, rows: Sequence[CollabRow], path: Path, shape: Shape) -> Written:
    try:
        if kind == "rl":
            tasks = rl_tasks(rows, system_prompt=shape.system_prompt, first_turn_only=shape.first_turn_only)
            count = write_tasks(path, tasks[: shape.max_rows])
        else:
            conversations = sft_conversations(
                rows, system_prompt=shape.system_prompt, metric=shape.metric, threshold=shape.threshold
            )
            count = write_conversations(path, conversations[: shape.max_rows])
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from None
    return Written(path, len(rows), count, len({row.conv_id for row in rows}))
