"""Held-out splits: a function of each conversation's task and of nothing else. Pure.

A task is held out where the hash of its text, as a number in [0, 1), lies below the share. So every call agrees,
whatever rows, order, conv_ids or form it is given: with one share an SFT set never holds a task that an RL set holds
out, and a larger share holds out all that a smaller one does. There is no seed: another seed would be another set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from collab_megatron.data.collab_rows import CollabRow
from collab_megatron.errors import UserError

DEFAULT_SHARE = 0.1
SHOWN_CHARACTERS = 60


def task_key(single_turn_prompt: str) -> str:
    """What identifies a task across datasets: its text, white space aside."""
    return " ".join(single_turn_prompt.split())


def task_position(single_turn_prompt: str) -> float:
    """The task's place in [0, 1), evenly spread over tasks."""
    text = task_key(single_turn_prompt).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, person=b"held out").digest()) / 2**64


def split_rows(rows: Sequence[CollabRow], share: float) -> tuple[list[CollabRow], list[CollabRow]]:
    """(train, validation); about `share` of the tasks go to validation, whole conversations, the same in every call.

    Conversations about one single_turn_prompt stay together. Raises UserError where a side would be empty.
    """
    if not 0.0 < share < 1.0:
        raise UserError(f"--validation-share {share}: it takes 0 < share < 1, or 0 to hold out nothing")
    held_out = [row for row in rows if task_position(row.single_turn_prompt) < share]
    train = [row for row in rows if task_position(row.single_turn_prompt) >= share]
    if not held_out or not train:
        tasks = len({task_key(row.single_turn_prompt) for row in rows})
        raise UserError(
            f"{'none' if not held_out else 'every one'} of the {tasks:,} tasks falls into the held-out share of "
            f"{share:g} (chosen by each task's text): change --validation-share, name held-out rows with --validation, "
            "or hold out nothing with --validation-share 0"
        )
    return train, held_out


def shared_tasks(train: Iterable[str], held_out: Iterable[str]) -> list[str]:
    """The held-out tasks (single_turn_prompts) that stand among the training ones too, each once."""
    known = {task_key(text) for text in train}
    return [key for key in dict.fromkeys(map(task_key, held_out)) if key in known]


def refuse_overlap(train: Iterable[CollabRow], held_out: Sequence[CollabRow], source: str, other: str) -> None:
    """Raises UserError where held-out rows (of `other`) are about tasks that stand in the training rows (`source`)."""
    asked = {task_key(row.single_turn_prompt) for row in held_out}
    shared = shared_tasks((row.single_turn_prompt for row in train), (row.single_turn_prompt for row in held_out))
    if shared:
        example = shared[0] if len(shared[0]) <= SHOWN_CHARACTERS else shared[0][:SHOWN_CHARACTERS] + "..."
        raise UserError(
            f"{len(shared):,} of the {len(asked):,} held-out tasks in {other} stand in {source} too, such as "
            f"{example!r}: take them out of one of the two, or leave --validation out and hold out a share"
        )
