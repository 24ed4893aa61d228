"""Equal replies: which replies of a group are one and the same, and so have one expected reward. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from collab_megatron.types import PolicyTurn


def first_equal(turns_G: Sequence[PolicyTurn]) -> list[int]:
    """For each reply the index of the first reply with the same token ids, its own if there is none before it.

    Ids, not texts: the policy's later turns see the ids. A failed request (no ids) equals nothing.
    Example: replies a, b, a give [0, 1, 0].
    """
    first: dict[tuple[int, ...], int] = {}
    return [first.setdefault(turn.generation.token_ids_T or (-1, index), index) for index, turn in enumerate(turns_G)]


def is_uniform(turns_G: Sequence[PolicyTurn]) -> bool:
    """Whether all replies are equal, so that none can be better than another."""
    return len(turns_G) > 1 and not any(first_equal(turns_G))
