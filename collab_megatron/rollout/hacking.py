"""Reward-hacking panel: figures that move when replies please the reward instead of the user. Pure.

A policy that is rewarded for asking asks where nothing is missing; one that is rewarded by a judge learns phrases that
this judge likes, at whatever length. None of these figures is part of the reward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from collab_megatron.figures import Figure, Figures
from collab_megatron.rollout.evaluation_tasks import is_opening
from collab_megatron.rollout.rewards import asks_question, clamped_shares
from collab_megatron.rollout.rewards.aggregate import DEFAULT_CLAMPS, Clamps
from collab_megatron.rollout.rewards.second_judge import OPENING_COMPLETE
from collab_megatron.types import Future, Group, Reply

PHRASE_WORDS = 4
MOST_CONVERSATIONS = 256
"""Whose phrases are counted, in one process and step: this work blocks the event loop."""
AGREES_WITHIN = 0.25
"""Two judges agree about a score in [0, 1] if theirs differ by no more."""


def hacking_metrics(groups: Sequence[Group], weights: Mapping[str, float], clamps: Clamps = DEFAULT_CLAMPS) -> Figures:
    """The figures of a step's groups, named hacking/...; docs/rewards.md describes each."""
    replies = [(group.task, reply) for group in groups for reply in group.replies_G]
    futures = [future for _, reply in replies for future in reply.futures_K]
    scored = [future for future in futures if future.status.scored and future.scores]
    needless = [
        float(asks_question(reply.text))
        for task, reply in replies
        if is_opening(task) and (task.ambiguous is False or _judged_complete(reply))
    ]
    lengths = [future.policy_tokens for future in scored]
    clamped = clamped_shares(scored, weights, clamps)[""]
    return {
        "hacking/needless_questions": Figure.of("mean", needless),
        "hacking/clamped_share": Figure.ratio(clamped * len(scored), len(scored)),
        "hacking/conversation_tokens_mean": Figure.of("mean", lengths),
        **_phrase_metrics(groups),
        **_second_judge_metrics([future for future in scored if future.second_scores and not future.copied]),
    }


def _phrase_metrics(groups: Sequence[Group]) -> Figures:
    """Of one conversation per group: repeated phrases within it, and the phrase that most groups share."""
    chosen = [(group, found) for group in groups if (found := _first_played(group))][:MOST_CONVERSATIONS]
    repeated = []
    shared: Counter[tuple[str, ...]] = Counter()
    for group, (reply, future) in chosen:
        phrases = [phrase for text in _assistant_texts(reply, future) for phrase in phrases_of(text)]
        if phrases:
            repeated.append(1.0 - len(set(phrases)) / len(phrases))
        asked = {phrase for message in group.task.prompt for phrase in phrases_of(message.content)}
        shared.update(set(phrases_of(reply.text)) - asked)
    most = max(shared.values(), default=0)
    return {
        "hacking/repeated_phrases": Figure.of("mean", repeated),
        "hacking/common_phrase_share": Figure.of("max", [most / len(chosen)] if len(chosen) > 1 else []),
    }


def _second_judge_metrics(futures: Sequence[Future]) -> Figures:
    """Agreement of the two judges by metric, and by how much the first, which is rewarded, is more generous."""
    figures: Figures = {}
    for name in sorted({name for future in futures for name in future.second_scores} - {OPENING_COMPLETE}):
        gaps = [future.scores[name] - future.second_scores[name] for future in futures]
        figures[f"hacking/{name}_agreement"] = Figure.of("mean", [float(abs(gap) <= AGREES_WITHIN) for gap in gaps])
        figures[f"hacking/{name}_generosity"] = Figure.of("mean", gaps)
    return figures


def _judged_complete(reply: Reply) -> bool:
    """Whether the second judge has seen this reply and says that its opening leaves nothing out."""
    return any(future.second_scores.get(OPENING_COMPLETE) for future in reply.futures_K)


def phrases_of(text: str) -> Iterator[tuple[str, ...]]:
    """Every run of PHRASE_WORDS words, in lower case and without punctuation at their ends."""
    words = [word.strip(".,;:!?\"'()[]*").lower() for word in text.split()]
    starts = range(len(words) - PHRASE_WORDS + 1)
    return (tuple(words[start : start + PHRASE_WORDS]) for start in starts)


def _first_played(group: Group) -> tuple[Reply, Future] | None:
    return next(((reply, future) for reply in group.replies_G for future in reply.futures_K), None)


def _assistant_texts(reply: Reply, future: Future) -> list[str]:
    return [reply.text, *(turn.reply for turn in future.turns)]
