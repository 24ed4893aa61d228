"""CollabLLM rows to RL tasks, one for each chat history. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from collab_megatron.data.collab_rows import CollabRow
from collab_megatron.types import Message, Task


def rl_tasks(rows: Iterable[CollabRow], *, system_prompt: str = "", first_turn_only: bool = False) -> list[Task]:
    """The distinct (history, task) pairs in the order of the rows. Candidates of one turn become one task.

    Two tasks may share a vague opening and stay separate, because simulator and metrics know more than the opening.
    A non-empty `system_prompt` replaces that of the rows. `first_turn_only` keeps the opening of each conversation.
    """
    rows = list(rows)
    first_turn: dict[tuple[str, str], int] = {}
    for row in rows:
        first_turn[row.conversation] = min(row.turn_id, first_turn.get(row.conversation, row.turn_id))
    tasks: dict[str, Task] = {}
    for row in rows:
        if first_turn_only and row.turn_id != first_turn[row.conversation]:
            continue
        prompt = with_system(row.prompt, system_prompt)
        task_id = _task_id(prompt, row.single_turn_prompt)
        if task_id in tasks:
            continue
        tasks[task_id] = Task(
            task_id=task_id,
            prompt=prompt,
            single_turn_prompt=row.single_turn_prompt,
            ground_truth=row.ground_truth or row.single_turn_completion or row.completion,
            task_desc=row.task_desc,
            metadata=row.metadata,
        )
    return list(tasks.values())


def with_system(prompt: tuple[Message, ...], system_prompt: str) -> tuple[Message, ...]:
    """`prompt` with `system_prompt` in place of its own; unchanged if that is empty."""
    if not system_prompt:
        return prompt
    return (Message("system", system_prompt), *(message for message in prompt if message.role != "system"))


def _task_id(prompt: tuple[Message, ...], single_turn_prompt: str) -> str:
    key = json.dumps([[(m.role, m.content) for m in prompt], single_turn_prompt], ensure_ascii=False)
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()[:16]
