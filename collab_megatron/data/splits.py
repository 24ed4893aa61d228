"""Held-out splits that depend on each conversation's task only. Pure.

A task is held out if the hash of its text, as a number in [0, 1), is below the share. So all calls agree, for any rows,
order, conv_ids and form: with the same share, an SFT set never contains a task that an RL set holds out, and a larger
share holds out a superset. There is no seed, because another seed would give another set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from collab_megatron.data.collab_rows import CollabRow
from collab_megatron.errors import UserError

DEFAULT_SHARE = 0.1
SHOWN_CHARACTERS = 60


def task_key(single_turn_prompt: str) -> str:
    """The identity of a task across datasets: its text with normalized white space."""
    return " ".join(single_turn_prompt.split())


def task_position(single_turn_prompt: str) -> float:
    """The hash of the task as a number in [0, 1), uniform over tasks."""
    text = task_key(single_turn_prompt).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, person=b"held out").digest()) / 2**64


def split_rows(rows: Sequence[CollabRow], share: float) -> tuple[list[CollabRow], list[CollabRow]]:
    """(train, validation): whole conversations of about `share` of the tasks, the same in every call, are validation.

    Conversations with the same single_turn_prompt stay together. Raises UserError if a side would be empty.
    """
    if not 0.0 < share < 1.0:
        raise UserError(f"--validation-share {share}: it must be above 0 and below 1, or 0 to hold out nothing")
    held_out = [row for row in rows if task_position(row.single_turn_prompt) < share]
    train = [row for row in rows if task_position(row.single_turn_prompt) >= share]
    if not held_out or not train:
        tasks = len({task_key(row.single_turn_prompt) for row in rows})
        raise UserError(
            f"{'none' if not held_out else 'every one'} of the {tasks:,} tasks falls into the held-out share of "
            f"{share:g} (by the hash of their texts): change --validation-share, name held-out rows with --validation, "
            "or hold out nothing with --validation-share 0"
        )
    return train, held_out


def shared_tasks(train: Iterable[str], held_out: Iterable[str]) -> list[str]:
    """The held-out tasks (single_turn_prompts) that are also training tasks, each once."""
    known = {task_key(text) for text in train}
    return [key for key in dict.fromkeys(map(task_key, held_out)) if key in known]


def refuse_overlap(train: Iterable[CollabRow], held_out: Sequence[CollabRow], source: str, other: str) -> None:
    """Raises UserError if held-out rows (of `other`) have tasks of the training rows (of `source`)."""
    asked = {task_key(row.single_turn_prompt) for row in held_out}
    shared = shared_tasks((row.single_turn_prompt for row in train), (row.single_turn_prompt for row in held_out))
    if shared:
        example = shared[0] if len(shared[0]) <= SHOWN_CHARACTERS else shared[0][:SHOWN_CHARACTERS] + "..."
        raise UserError(
            f"{len(shared):,} of the {len(asked):,} held-out tasks in {other} are also in {source}, such as "
            f"{example!r}: remove them from one of the two, or leave --validation out to hold out a share"
        )
