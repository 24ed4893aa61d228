"""conversations.jsonl: every tree of every step, one line each, readable without this package."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from collab_megatron.errors import RunError
from collab_megatron.types import Group, Message


class TreeRecorder:
    """Appends trees to a file. On resume, lines of steps that will be run again are taken out first."""

    def __init__(self, path: Path, *, first_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _drop_steps(path, first_step)
        self._path = path

    def write(self, step: int, groups: Sequence[Group]) -> None:
        """One line per group. Raises RunError when the disk refuses."""
        try:
            with self._path.open("ab") as file:
                for group in groups:
                    file.write(orjson.dumps(tree_record(step, group)) + b"\n")
        except OSError as error:
            raise RunError(f"driver cannot append to {self._path}: {error.strerror}; free some space") from None


def tree_record(step: int, group: Group) -> dict[str, Any]:
    """One tree as plain JSON values."""
    return {
        "step": step,
        "task_id": group.task.task_id,
        "ambiguous": group.task.ambiguous,
        "single_turn_prompt": group.task.single_turn_prompt,
        "ground_truth": group.task.ground_truth,
        "prompt": _messages(group.task.prompt),
        "kept": group.kept,
        "replies": [
            {
                "text": reply.text,
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


def _drop_steps(path: Path, first_step: int) -> None:
    """Rewrite `path` without steps >= first_step and without a torn last line; aside, then renamed."""
    aside = path.with_name(path.name + ".tmp")
    with path.open("rb") as old, aside.open("wb") as new:
        for line in old:
            if not line.endswith(b"\n"):
                continue
            if orjson.loads(line)["step"] < first_step:
                new.write(line)
    os.replace(aside, path)
