"""Where a policy turn's thoughts end and its reply begins.

Simulators, judges, metrics and question counts are given the reply alone; a user never sees the rest. The tags are
looked for in the text: most tokenizers have no token for them, and those that have one decode it to the same text.
"""

from __future__ import annotations

from typing import NamedTuple

THOUGHT_TAGS = ("<think>", "</think>")
"""Qwen3, DeepSeek-R1 and whatever was trained on their turns."""


class Split(NamedTuple):
    """A turn's text in two."""

    thought: str  # without the tags; thoughts of several places are joined by an empty line
    reply: str  # verbatim where nothing was thought; behind a thought it begins with its first letter
    closed: bool  # False: the turn ended inside a thought


def split_thoughts(text: str, tags: tuple[str, str] = THOUGHT_TAGS, *, opened: bool = False) -> Split:
    """Split the text of one policy turn.

    `opened`: the prompt ended with the opening tag, so `text` begins inside a thought. The same is assumed where a
    closing tag comes without an opening one: what stands before it is no reply. A thought may stand anywhere in a turn.
    """
    start, end = tags
    thoughts: list[str] = []
    said: list[str] = []
    rest, inside = text, opened
    while True:
        if inside:
            thought, found, rest = rest.partition(end)
            thoughts.append(thought.replace(start, "").strip())
            if not found:
                break
            inside = False
        first_end, first_start = rest.find(end), rest.find(start)
        if first_end >= 0 and (first_start < 0 or first_end < first_start):
            rest, inside = "".join([*said, rest]), True
            said = []
            continue
        reply, found, rest = rest.partition(start)
        said.append(reply)
        if not found:
            break
        inside = True
    thought = "\n\n".join(part for part in thoughts if part)
    if not thoughts:
        return Split("", text, closed=True)
    return Split(thought, "".join(said).lstrip(), closed=not inside)
