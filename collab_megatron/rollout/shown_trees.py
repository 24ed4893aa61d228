"""The best, the median and the worst conversation tree of a batch as plain text, for TensorBoard's Text tab.

The viewer shows all trees with everything; these three say at a glance what is rewarded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean

from collab_megatron.figures import best_median_worst
from collab_megatron.text import whole_text
from collab_megatron.types import Group, Reply, ShownTree

LONGEST_MESSAGE, LONGEST_TREE = 600, 6000  # characters


def shown_trees(groups: Sequence[Group]) -> tuple[ShownTree, ...]:
    """Best, median and worst by the mean reward of a tree's scored replies; fewer if fewer trees have one."""
    scored = [(fmean(found), group) for group in groups if (found := _rewards(group))]
    return tuple(ShownTree(mean, _text(group, mean)) for mean, group in best_median_worst(scored, lambda tree: tree[0]))


def _rewards(group: Group) -> list[float]:
    return [reply.mr for reply in group.replies_G if reply.mr is not None]


def _text(group: Group, mean: float) -> str:
    lines = [f"task {group.task.task_id}: mean reward {mean:.3f} of {len(_rewards(group))} scored replies", ""]
    lines += [_said(message.role, message.content) for message in group.task.prompt[-1:]]
    for number, reply in enumerate(group.replies_G, start=1):
        lines += _of_reply(number, reply)
    text = whole_text("\n".join(lines))
    return text if len(text) <= LONGEST_TREE else text[:LONGEST_TREE] + "\n..."


def _of_reply(number: int, reply: Reply) -> Iterator[str]:
    reward = "no reward" if reply.mr is None else f"reward {reply.mr:.3f}"
    advantage = "" if reply.advantage is None else f", advantage {reply.advantage:+.2f}"
    yield f"\nreply {number}: {reward}{advantage}"
    if reply.same_as is not None:
        yield f"    the same as reply {reply.same_as + 1}"
        return
    yield _said("assistant", reply.text)
    for future in reply.futures_K[:1]:
        yield from (_said(message.role, message.content, "    ") for message in future.messages)
        left = len(reply.futures_K) - 1
        yield f"    ({future.status}{f'; {left} more' if left else ''})"


def _said(role: str, content: str, indent: str = "  ") -> str:
    text = content if len(content) <= LONGEST_MESSAGE else content[:LONGEST_MESSAGE] + "..."
    return f"{indent}{role}: {text.replace(chr(10), chr(10) + indent + '  ')}"
