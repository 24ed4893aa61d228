"""Held-out splits: whole conversations, never single rows. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence

from collab_megatron.data.schema import CollabRow
from collab_megatron.errors import UserError


def split_rows(rows: Sequence[CollabRow], share: float, seed: int) -> tuple[list[CollabRow], list[CollabRow]]:
    """(train, validation); about `share` of the tasks go to validation, at least one, the same for the same seed.

    Conversations about one single_turn_prompt stay together, so no task is seen in training and held out as well.
    Raises UserError if a side would be empty.
    """
    tasks = list(dict.fromkeys(row.single_turn_prompt for row in rows))
    if not 0.0 < share < 1.0 or len(tasks) < 2:
        raise UserError(
            f"cannot hold out a share of {share} of {len(tasks)} tasks: it takes 0 < share < 1 and two tasks"
        )
    random.Random(f"split/{seed}").shuffle(tasks)
    held_out = set(tasks[: min(max(1, round(share * len(tasks))), len(tasks) - 1)])
    train = [row for row in rows if row.single_turn_prompt not in held_out]
    return train, [row for row in rows if row.single_turn_prompt in held_out]
