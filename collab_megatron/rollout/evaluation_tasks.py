"""Which held-out tasks an evaluation plays, and how each begins. The choice is a pure function of tasks and seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from collab_megatron.errors import RunError
from collab_megatron.types import Message, Task, UserSimulator

Numbered = tuple[int, Task]
"""A task and its place in the file, which names its conversations however many others are played."""


def is_opening(task: Task) -> bool:
    """Whether the policy speaks first after one user turn."""
    return sum(message.role == "user" for message in task.prompt) == 1


def sample_tasks(tasks: Sequence[Task], count: int, seed: int, *, openings_only: bool = False) -> list[Numbered]:
    """`count` tasks (all, if there are fewer), in the file's order.

    The same at every step, in every process and for any order of rows with names of their own; a larger count adds
    tasks to those of a smaller one. `openings_only` leaves later turns out where the file has openings at all.
    """
    numbered = list(enumerate(tasks))
    if openings_only:
        numbered = [(number, task) for number, task in numbered if is_opening(task)] or numbered
    return sorted(sorted(numbered, key=lambda item: (_draw(seed, item[1].task_id), item[0]))[:count], key=_place)


def has_both(tasks: Sequence[Numbered]) -> bool:
    """Whether openings and later turns are among them."""
    return len({is_opening(task) for _, task in tasks}) > 1


async def with_simulated_opening(task: Task, user: UserSimulator, *, sample_index: int, signal: str) -> Task:
    """The task with an opening that the simulated user wrote from the whole request; system messages stay.

    `signal`: the user's termination signal, which opens nothing. Whether that opening leaves something out is not
    known: the dataset's `ambiguous` is about its own opening, and is taken away. Waits for one LLM call. Raises
    RunError where no opening comes.
    """
    system = tuple(message for message in task.prompt if message.role == "system")
    opening = (await user.reply(task, system, sample_index=sample_index)).replace(signal, "").strip()
    if not opening:
        raise RunError(f"the simulated user ended the conversation of task {task.task_id} instead of opening it")
    metadata = {name: value for name, value in task.metadata.items() if name != "ambiguous"}
    return replace(task, prompt=(*system, Message("user", opening)), metadata=metadata)


def _draw(seed: int, task_id: str) -> bytes:
    return hashlib.blake2b(f"{seed}/{task_id}".encode("utf-8", "backslashreplace"), digest_size=8).digest()


def _place(item: Numbered) -> int:
    return item[0]
