"""Conversation trees of a record as groups again: the opposite of record_lines.py, as far as scoring needs it.

What the record does not have is left empty: the sampled text of a turn before its thought is split off, the contexts
of later turns, and of a task all of its metadata except `ambiguous`, unless `tasks` has the task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from collab_megatron.types import Future, Generation, Group, Message, PolicyTurn, Reply, RolloutStatus, Task


def group_of(row: Mapping[str, Any], tasks: Mapping[str, Task]) -> Group:
    """The group of a line (docs/record.md). tasks: by id, for what the record does not have. Raises KeyError or
    ValueError for a line of another form."""
    prompt = _messages(row["prompt"])
    metadata = {} if row["ambiguous"] is None else {"ambiguous": row["ambiguous"]}
    recorded = Task(row["task_id"], prompt, row["single_turn_prompt"], row["ground_truth"], metadata=metadata)
    return Group(
        task=tasks.get(row["task_id"], recorded),
        prompt_ids=tuple(row["prompt_ids"]),
        replies_G=tuple(_reply(reply) for reply in row["replies"]),
        kept=row["kept"],
        error=row["error"],
    )


def _reply(row: Mapping[str, Any]) -> Reply:
    return Reply(
        turn=_turn(row),
        futures_K=tuple(_future(index, future) for index, future in enumerate(row["futures"])),
        mr=row["mr"],
        advantage=row["advantage"],
        same_as=row["same_as"],
    )


def _future(index: int, row: Mapping[str, Any]) -> Future:
    return Future(
        index=index,
        status=RolloutStatus(row["status"]),
        messages=_messages(row["messages"]),
        scores=row["scores"],
        reward=row["reward"],
        policy_tokens=row["policy_tokens"],
        error=row["error"],
        turns=tuple(_turn(turn) for turn in row["turns"]),
        copied=row["copied"],
    )


def _turn(row: Mapping[str, Any]) -> PolicyTurn:
    versions = tuple(version for version, count in row["version_runs"] for _ in range(count))
    generation = Generation(tuple(row["token_ids"]), tuple(row["logprobs"]), versions, row["finish_reason"])
    return PolicyTurn(row["thought"], row["text"], "", row["cut"], generation, row["begin_s"], row["end_s"])


def _messages(rows: Sequence[Mapping[str, str]]) -> tuple[Message, ...]:
    return tuple(Message(row["role"], row["content"]) for row in rows)
