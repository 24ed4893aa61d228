"""Sampling of the held-out tasks of an evaluation, a pure function of tasks and seed; simulated openings."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from collab_megatron.errors import RunError
from collab_megatron.types import Message, Task, UserSimulator

Numbered = tuple[int, Task]
"""A task with its index in the file. The index names its conversations, whatever other tasks are played."""


def is_opening(task: Task) -> bool:
    """Whether the prompt has one user turn only, so the policy replies to an opening."""
    return sum(message.role == "user" for message in task.prompt) == 1


def sample_tasks(tasks: Sequence[Task], count: int, seed: int, *, openings_only: bool = False) -> list[Numbered]:
    """`count` tasks (all, if there are fewer), in the file's order.

    The sample is the same at every step, in every process, and for any order of rows with unique task ids. A larger
    count adds tasks to the sample of a smaller one. `openings_only` skips later turns if the file has any openings.
    """
    numbered = list(enumerate(tasks))
    if openings_only:
        numbered = [(number, task) for number, task in numbered if is_opening(task)] or numbered
    return sorted(sorted(numbered, key=lambda item: (_draw(seed, item[1].task_id), item[0]))[:count], key=_place)


def with_system_message(task: Task, text: str) -> Task:
    """The task with `text` after its system message, or as its system message."""
    first, *rest = task.prompt
    if first.role == "system":
        return replace(task, prompt=(Message("system", f"{first.content}\n\n{text}"), *rest))
    return replace(task, prompt=(Message("system", text), *task.prompt))


def has_both(tasks: Sequence[Numbered]) -> bool:
    """Whether the tasks include openings and later turns."""
    return len({is_opening(task) for _, task in tasks}) > 1


async def with_simulated_opening(task: Task, user: UserSimulator, *, sample_index: int, signal: str) -> Task:
    """The task with an opening that the simulated user writes from the whole request; system messages stay.

    `signal`, the user's termination signal, is removed from it. The dataset's `ambiguous` describes the dataset's own
    opening and is dropped. Waits for one LLM call. Raises RunError without an opening.
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
