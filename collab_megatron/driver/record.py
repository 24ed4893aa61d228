"""A conversation tree as a line of the run's record, readable without this package: docs/RECORD.md field by field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from collab_megatron.types import Group, Message

SCHEMA = 1
"""Counts up when a field changes its meaning or goes; a field that is added leaves it."""


def tree_line(step: int, group: Group) -> bytes:
    """One tree as a line of the record. `step` as TensorBoard counts: the first batch is that of step 1."""
    return orjson.dumps(tree_record(step, group)) + b"\n"


def tree_record(step: int, group: Group) -> dict[str, Any]:
    """One tree as plain JSON values."""
    return {
        "schema": SCHEMA,
        "step": step,
        "task_id": group.task.task_id,
        "ambiguous": group.task.ambiguous,
        "single_turn_prompt": group.task.single_turn_prompt,
        "ground_truth": group.task.ground_truth,
        "prompt": _messages(group.task.prompt),
        "kept": group.kept,
        "error": group.error,
        "replies": [
            {
                "text": reply.text,
                "thought": reply.thought,
                "mr": reply.mr,
                "advantage": reply.advantage,
                "finish_reason": reply.generation.finish_reason,
                "token_ids": reply.generation.token_ids_T,
                "logprobs": reply.generation.logprobs_T,
                "weight_versions": sorted(set(reply.generation.versions_T)),
                "futures": [
                    {
                        "status": future.status.value,
                        "messages": _messages(future.messages),
                        "scores": dict(future.scores),
                        "reward": future.reward,
                        "policy_tokens": future.policy_tokens,
                        "weight_versions": list(future.versions),
                        "error": future.error,
                    }
                    for future in reply.futures_K
                ],
            }
            for reply in group.replies_G
        ],
    }


def _messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]
