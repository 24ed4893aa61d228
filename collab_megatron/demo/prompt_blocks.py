"""What rule-based roles read of a chat-completion request: its turns, and the blocks of a simulator's prompt.

`<request>...</request>` is the complete request, `<chat>...</chat>` has one JSON object with `role` and `content` per
line.
"""

from __future__ import annotations

import json
from typing import Any

Turn = tuple[str, str]  # (role, content)


def block(prompt: str, tag: str) -> str:
    """The text between the tags. Raises ValueError if there is none."""
    # The last closing tag and the nearest opening before it: instructions above may mention the tags by name.
    end = prompt.rfind(f"</{tag}>")
    start = prompt.rfind(f"<{tag}>", 0, max(end, 0))
    if end < 0 or start < 0:
        raise ValueError(f"the last message holds no <{tag}>...</{tag}> block")
    return prompt[start + len(tag) + 2 : end].strip()


def chat_block(prompt: str, tag: str = "chat") -> list[Turn]:
    """The chat of a prompt between the tags; empty before the opening. Raises ValueError."""
    lines = [line for line in block(prompt, tag).split("\n") if line.strip()]  # JSON may contain other line ends
    try:
        chat = [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise ValueError(f"the <{tag}> block must have one JSON object per line: {error}") from error
    return read_turns(chat, f"<{tag}>", allow_empty=True)


def read_turns(messages: Any, where: str, *, allow_empty: bool = False) -> list[Turn]:
    """Messages as turns. Raises ValueError for anything else."""
    if not isinstance(messages, list) or not (messages or allow_empty):
        raise ValueError(f"{where} must be a list of turns" + ("" if allow_empty else " that is not empty"))
    turns = []
    for i, message in enumerate(messages):
        ok = isinstance(message, dict) and isinstance(message.get("content"), str)
        if not ok or message.get("role") not in ("system", "user", "assistant"):
            raise ValueError(f"{where}[{i}] must have a role (system, user, assistant) and a content that is a string")
        turns.append((message["role"], message["content"]))
    return turns
