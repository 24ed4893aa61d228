"""Convert CollabLLM rows to the parquet files of training, for tools/prepare_dataset.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Literal, TypeVar

from collab_megatron.data.bad_rows import BadRows
from collab_megatron.data.collab_rows import CollabRow
from collab_megatron.data.dataset_source import load_rows
from collab_megatron.data.lengths import LengthCheck
from collab_megatron.data.parquet import write_conversations, write_pairs, write_tasks
from collab_megatron.data.preference_pairs import preference_pairs
from collab_megatron.data.rl_tasks import rl_tasks
from collab_megatron.data.sft_conversations import sft_conversations
from collab_megatron.data.splits import DEFAULT_SHARE, refuse_overlap, split_rows
from collab_megatron.data.statistics import describe_rows
from collab_megatron.errors import UserError
from collab_megatron.types import Message

T = TypeVar("T")
Chat = tuple[Message, ...]

Kind = Literal["sft", "rl", "dpo"]
KINDS: tuple[Kind, ...] = ("rl", "sft", "dpo")
TEXT_SUFFIXES = (".txt", ".md")


@dataclass(frozen=True)
class PrepareOptions:
    """Options for the conversion of rows."""

    system_prompt: str = ""
    first_turn_only: bool = False  # RL: only openings
    max_rows: int | None = None  # per file
    metric: str | None = None  # SFT: keep rows whose reward with this name reaches `threshold`
    threshold: float = 0.0
    task_desc: str | None = None  # replaces the rows' own
    minimum_gap: float = 0.0  # DPO: of the scores of a pair; a pair is above it
    lengths: LengthCheck = field(default_factory=LengthCheck)


@dataclass(frozen=True)
class Written:
    """One written file and its counts."""

    path: Path
    rows_read: int
    rows_written: int
    conversations: int
    notes: tuple[str, ...] = ()  # lines for the user: lengths, what was left out


def prepare(
    kind: Kind,
    dataset: str,
    output: Path,
    *,
    splits: Sequence[str] = (),
    validation: str | None = None,
    validation_share: float | None = None,
    skip_bad_rows: bool = False,
    options: PrepareOptions = PrepareOptions(),
) -> list[Written]:
    """Write {kind}_train.parquet, and {kind}_validation.parquet if there is held-out data.

    Held-out data is a dataset of its own (`validation`) or a share of `dataset`, in whole conversations; a share of
    None is DEFAULT_SHARE, 0 holds out nothing. `splits` are those of `dataset`. Prints statistics and a line about
    skipped rows.
    Raises UserError, also if a task is on both sides.
    """
    if validation is not None and validation_share is not None:
        raise UserError("give --validation or --validation-share, not both")
    if validation_share is not None and not 0 <= validation_share < 1:  # also for NaN
        raise UserError(f"--validation-share {validation_share:g}: it must be at least 0 and below 1")
    if options.max_rows is not None and options.max_rows < 1:
        raise UserError(f"--max-rows {options.max_rows}: it must be at least 1")
    rows = _load(kind, dataset, splits, skip_bad_rows)
    held_out: Sequence[CollabRow] = ()
    share = DEFAULT_SHARE if validation_share is None else validation_share
    if validation is not None:
        held_out = _load(kind, validation, (), skip_bad_rows)
        refuse_overlap(rows, held_out, dataset, validation)
    elif share:
        rows, held_out = split_rows(rows, share)
    written = [_write(kind, rows, output / f"{kind}_train.parquet", options)]
    if held_out:
        written.append(_write(kind, held_out, output / f"{kind}_validation.parquet", options))
    return written


def collaborative_prompt() -> str:
    """The shipped system prompt for a proactive assistant (data/prompts/collaborative_system.txt)."""
    file = resources.files("collab_megatron.data").joinpath("prompts", "collaborative_system.txt")
    return file.read_text("utf-8").strip()


def text_or_file(value: str, flag: str) -> str:
    """`value`, or the stripped text of the file that it names.

    Raises UserError for a file that cannot be read, or the name of a text file that does not exist.
    """
    short = "\n" not in value and len(value) < 256
    path = Path(value)
    if short and path.is_file():
        try:
            return path.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{flag} {value} cannot be read: {error}") from None
    if short and path.suffix in TEXT_SUFFIXES and " " not in value:
        raise UserError(f"{flag} {value}: there is no such file; name another one, or give the text itself")
    return value


def _load(kind: Kind, source: str, splits: Sequence[str], skip_bad_rows: bool) -> list[CollabRow]:
    bad = BadRows(skip=skip_bad_rows)
    rows = load_rows(source, splits, bad)
    if notice := bad.notice():
        print(notice)
    print(f"{source}: " + "\n  ".join(describe_rows(rows)))
    if kind == "rl" and (plain := sum(not row.has_task for row in rows)):
        raise UserError(
            f"{plain:,} of {len(rows):,} rows of {source} are plain messages without a single_turn_prompt, which the "
            "simulated user of RL needs: use --dataset-type sft, or rows of the other forms (docs/data.md)"
        )
    return rows


def _write(kind: Kind, rows: Sequence[CollabRow], path: Path, options: PrepareOptions) -> Written:
    if options.task_desc is not None:
        rows = [replace(row, task_desc=options.task_desc) for row in rows]
    notes: list[str] = []

    def fitting(found: Sequence[T], chats: Callable[[T], Sequence[Chat]]) -> list[T]:
        kept, lines = options.lengths.fitting(found, chats, path)
        notes.extend(lines)
        return kept[: options.max_rows]

    try:
        if kind == "rl":
            tasks = rl_tasks(rows, system_prompt=options.system_prompt, first_turn_only=options.first_turn_only)
            count = write_tasks(path, fitting(tasks, lambda task: [task.prompt]))
        elif kind == "sft":
            conversations = sft_conversations(
                rows, system_prompt=options.system_prompt, metric=options.metric, threshold=options.threshold
            )
            count = write_conversations(path, fitting(conversations, lambda chat: [chat.messages]))
        else:
            pairs = preference_pairs(rows, system_prompt=options.system_prompt, minimum_gap=options.minimum_gap)
            notes += [pairs.notice] if pairs.notice else []
            both = fitting(pairs.found, lambda pair: [(*pair.prompt, *pair.chosen), (*pair.prompt, *pair.rejected)])
            count = write_pairs(path, both)
    except (OSError, UnicodeEncodeError) as error:
        raise UserError(f"{path} cannot be written: {error}") from None
    return Written(path, len(rows), count, len({row.conversation for row in rows}), tuple(notes))
