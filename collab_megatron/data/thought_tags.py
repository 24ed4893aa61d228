"""Split a policy turn into thought and reply at the thought tags.

Simulators, judges, metrics and question counts get only the reply; a user never sees the thought. The tags are searched
in the text, because most tokenizers have no token for them, and the others decode their token to the same text.
"""

from __future__ import annotations

from typing import NamedTuple

THOUGHT_TAGS = ("<think>", "</think>")
"""The tags of Qwen3, DeepSeek-R1 and models that were trained on their turns."""


class Split(NamedTuple):
    """A turn's text in two parts."""

    thought: str  # without the tags; several thoughts are joined with an empty line
    reply: str  # verbatim without a thought; after one, without leading white space
    closed: bool  # False: the turn ended inside a thought


def split_thoughts(text: str, tags: tuple[str, str] = THOUGHT_TAGS, *, opened: bool = False) -> Split:
    """Split the text of one policy turn.

    `opened`: the prompt ended with the opening tag, so `text` begins inside a thought. The same is assumed for a
    closing tag without an opening one: the text before it is not a reply. A thought may be anywhere in a turn.
    """
    start, end = tags
    thoughts: list[str] = []
    visible: list[str] = []
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
            rest, inside = "".join([*visible, rest]), True
            visible = []
            continue
        reply, found, rest = rest.partition(start)
        visible.append(reply)
        if not found:
            break
        inside = True
    thought = "\n\n".join(part for part in thoughts if part)
    if not thoughts:
        return Split("", text, closed=True)
    return Split(thought, "".join(visible).lstrip(), closed=not inside)
