"""Simulated futures of a row, from each form in which datasets store them. Pure.

whole      [[{role, content}, ...], ...]: every session is a whole conversation, prompt and completion included (the
           hub's datasets, and what tools/build_dataset.py writes)
future     the same with the turns after the completion only (earlier versions of tools/build_dataset.py)
numbered   {"0": {"forward_chat": [...], "average_score": x, METRIC: {"score": y, ...}}, "1": ...}: the hub's "-large"
           datasets
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from collab_megatron.types import Message

CHAT, MEAN = "forward_chat", "average_score"  # of a numbered session; every other entry is a metric
MR = "MR"  # name of the multiturn-aware reward among a row's rewards

Futures = tuple[tuple[Message, ...], ...]


def read_futures(value: Any, prompt: Sequence[Message], completion: str) -> Futures:
    """The turns after `completion` in each session; () for null. Raises ValueError for an unknown form."""
    if value is None:
        return ()
    if isinstance(value, Mapping):
        chats = [session.get(CHAT) for session in _numbered(value)]
    elif isinstance(value, list):
        chats = value
    else:
        raise ValueError(f"sessions are a {type(value).__name__}, but must be a list of chats")
    head = [*(message for message in prompt if message.role != "system"), Message("assistant", completion)]
    return tuple(_future(_chat(chat), head) for chat in chats)


def session_scores(value: Any) -> dict[str, list[Any]]:
    """Metric -> its score in each numbered session, and MR; {} for the other forms, whose rows have `rewards`."""
    found: dict[str, list[Any]] = {}
    for session in _numbered(value) if isinstance(value, Mapping) else ():
        for name, part in session.items():
            score = part.get("score") if isinstance(part, Mapping) else part if name == MEAN else None
            if score is not None:
                found.setdefault(MR if name == MEAN else str(name), []).append(score)
    return found


def whole_sessions(
    prompt: Sequence[Message], completion: str, futures: Sequence[Sequence[Message]]
) -> list[list[dict[str, str]]]:
    """Futures in the `whole` form, without the system prompt, as the hub's datasets have them."""
    head = [*(message for message in prompt if message.role != "system"), Message("assistant", completion)]
    return [[message.as_dict() for message in (*head, *future)] for future in futures]


def _numbered(value: Mapping[Any, Any]) -> list[Mapping[Any, Any]]:
    """The sessions in the order of their numbers. In parquet, sessions that only other rows have are null."""
    return [
        session
        for _, session in sorted(value.items(), key=lambda item: _place(item[0]))
        if isinstance(session, Mapping)
    ]


def _place(name: Any) -> tuple[int, str]:
    text = str(name)
    return (int(text) if text.isdecimal() and len(text) < 10 else 10**9, text)


def _chat(value: Any) -> list[Message]:
    if not isinstance(value, list):
        raise ValueError("a session must be a list of messages")
    chat = []
    for turn in value:
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (None, None)
        if not (isinstance(role, str) and isinstance(content, str)):
            raise ValueError("a session has a turn that is no {role, content}")
        chat.append(Message(role, content))
    return [message for message in chat if message.role != "system"]


def _future(chat: Sequence[Message], head: Sequence[Message]) -> tuple[Message, ...]:
    """`chat` without `head`, or without the completion, where it begins with them."""
    for start in (head, head[-1:]):
        same = zip(chat, start, strict=False)
        if len(chat) >= len(start) and all((a.role, a.content.strip()) == (b.role, b.content.strip()) for a, b in same):
            return tuple(chat[len(start) :])
    return tuple(chat)
