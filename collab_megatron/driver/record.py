"""conversations.jsonl: every tree of every step, one line each, readable without this package."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from collab_megatron.errors import RunError
from collab_megatron.types import Group, Message

_STEP = re.compile(rb'\{"step":(\d+),')


class TreeRecorder:
    """Appends the trees of whole steps to a file. On resume, lines of steps that will be run again are taken out."""

    def __init__(self, path: Path, *, first_step: int | None) -> None:
        """first_step: the first that will be run again; None: none will."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._written = _drop_steps(path, first_step) if path.exists() else set()

    def write(self, step: int, lines: Sequence[bytes]) -> None:
        """The trees of `step`, unless they stand there already: a driver that was started again delivers a batch as
        often as it is asked for it. Raises RunError when the disk refuses."""
        if step in self._written:
            return
        try:
            with self._path.open("ab") as file:
                file.write(b"".join(lines))
        except OSError as error:
            raise RunError(f"driver cannot append to {self._path}: {error.strerror}; free some space") from None
        self._written.add(step)


def tree_line(step: int, group: Group) -> bytes:
    """One tree as a line of the file."""
    return orjson.dumps(tree_record(step, group)) + b"\n"


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


def _drop_steps(path: Path, first_step: int | None) -> set[int]:
    """Rewrite `path` without steps >= first_step, and without a step whose writing was cut off; aside, then renamed.
    The steps that stay."""
    steps, torn = set(), False
    with path.open("rb") as old:
        for line in old:
            torn = not line.endswith(b"\n")
            found = _STEP.match(line)
            steps.add(int(found[1]) if found else None)
    cut = {int(found[1]) if found else None} if torn else set()
    kept = {step for step in steps - cut if step is not None and (first_step is None or step < first_step)}
    if torn or kept != steps:
        aside = path.with_name(path.name + ".tmp")
        with path.open("rb") as old, aside.open("wb") as new:
            new.writelines(line for line in old if (found := _STEP.match(line)) and int(found[1]) in kept)
        os.replace(aside, path)
    return kept
