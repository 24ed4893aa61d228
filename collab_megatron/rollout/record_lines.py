"""Record lines: a conversation tree as one JSON line, readable without this package (fields: docs/record.md)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby, zip_longest
from typing import Any

import orjson

from collab_megatron.rollout.group import TreeId
from collab_megatron.text import on_one_line
from collab_megatron.types import Future, Group, PolicyTurn, Reply

SCHEMA = 1
"""Increased when a field is removed or changes its meaning; not for a new field."""


def tree_line(step: int, group: Group, tree_id: TreeId, *, replaced: bool, trained: bool) -> bytes:
    """One tree as a line of the record.

    `step` counts from 1, as in TensorBoard: the first optimizer step trains the batch of step 1. `tree_id` has the step
    for which the tree was started. `replaced`: another tree was started in its place. `trained`: the trainer gets its
    replies.
    """
    head = {"schema": SCHEMA, "step": step, "begun_for_step": tree_id.step + 1, "slot": tree_id.slot}
    return _line({**head, "replaced": replaced, "trained": trained, **tree_record(group)})


def held_out_line(step: int, group: Group) -> bytes:
    """A held-out conversation as a line: a tree of one reply and one future. `step`: optimizer steps before it."""
    return _line({"schema": SCHEMA, "step": step, **tree_record(group)})


def tree_record(group: Group) -> dict[str, Any]:
    """A tree as plain JSON values."""
    return {
        "task_id": group.task.task_id,
        "ambiguous": group.task.ambiguous,
        "single_turn_prompt": group.task.single_turn_prompt,
        "ground_truth": group.task.ground_truth,
        "prompt": [message.as_dict() for message in group.task.prompt],
        "prompt_ids": group.prompt_ids,
        "kept": group.kept,
        "error": group.error,
        "replies": [reply_record(reply) for reply in group.replies_G],
    }


def reply_record(reply: Reply) -> dict[str, Any]:
    """A reply with its futures, as plain JSON values."""
    return {
        **_turn(reply.turn),
        "mr": reply.mr,
        "advantage": reply.advantage,
        "same_as": reply.same_as,
        "futures": [_future(future) for future in reply.futures_K],
    }


def _turn(turn: PolicyTurn) -> dict[str, Any]:
    generation = turn.generation
    return {
        "text": turn.reply,
        "thought": turn.thought,
        "cut": turn.cut,
        "finish_reason": generation.finish_reason,
        "begin_s": turn.begin_s,
        "end_s": turn.end_s,
        "replayed": generation.replayed,
        "cached_tokens": generation.cached_tokens,
        "token_ids": generation.token_ids_T,
        "logprobs": generation.logprobs_T,
        "weight_versions": sorted(set(generation.versions_T)),
        "version_runs": [[version, len(list(run))] for version, run in groupby(generation.versions_T)],
    }


def _future(future: Future) -> dict[str, Any]:
    return {
        "status": future.status.value,
        "messages": [message.as_dict() for message in future.messages],
        "turns": [
            {**_turn(turn), "advantage": advantage}
            for turn, advantage in zip_longest(future.turns, future.advantages[: len(future.turns)])
        ],
        "calls": [vars(call) for call in future.calls],
        "scores": dict(future.scores),
        "second_scores": dict(future.second_scores),
        "details": dict(future.details),
        "reward": future.reward,
        "policy_tokens": future.policy_tokens,
        "weight_versions": list(future.versions),
        "error": future.error,
        "copied": future.copied,
    }


def _line(values: dict[str, Any]) -> bytes:
    try:
        line = orjson.dumps(values)
    except TypeError:  # an LLM wrote a surrogate or a large integer
        line = orjson.dumps(_writable(values))
    return on_one_line(line) + b"\n"


def _writable(value: Any) -> Any:
    """The value with lone surrogates as \\uXXXX escapes and integers above 64 bits as text."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return str(value)
    if isinstance(value, Mapping):
        return {_writable(key): _writable(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_writable(each) for each in value]
    return value
