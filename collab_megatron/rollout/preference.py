"""Preference pairs of online DPO: the best reply of a group against its worst, by multiturn-aware reward. Pure.

Rewards are those that the advantages compare: with overlong shaping, if it is on.
"""

from __future__ import annotations

from collections.abc import Sequence

from collab_megatron.config.sections import PreferenceSection
from collab_megatron.figures import Figure, Figures
from collab_megatron.rollout.group import has_spread, training_sample
from collab_megatron.types import Group, TrainingSample


def preference_pair(group: Group, rules: PreferenceSection) -> list[TrainingSample]:
    """[chosen, rejected]; empty for a group without a pair.

    A group gives no pair if it is dropped, if its rewards have too little spread (algorithm.min_group_std) or a gap of
    at most `rules.min_gap`, or if its best and worst reply are the same tokens: their gradients cancel. Of equal
    rewards the first reply counts. A reply without a reward is in no pair.
    """
    if not has_spread(group):
        return []
    scored = [
        (reply.shaped_reward, reply)
        for reply in group.replies_G
        if reply.shaped_reward is not None and reply.generation.token_ids_T
    ]
    if not scored:
        return []
    best, chosen = max(scored, key=lambda each: each[0])
    worst, rejected = min(scored, key=lambda each: each[0])
    if best - worst <= rules.min_gap or chosen.generation.token_ids_T == rejected.generation.token_ids_T:
        return []
    return [training_sample(group, reply) for reply in (chosen, rejected)]


def preference_figures(groups: Sequence[Group], rules: PreferenceSection) -> Figures:
    """Pairs of a step, the share of groups that gave one, and the rewards' difference inside the pairs."""
    pairs = [bool(preference_pair(group, rules)) for group in groups]
    gaps = []
    for group, is_pair in zip(groups, pairs, strict=True):
        rewards = [reply.shaped_reward for reply in group.replies_G if reply.shaped_reward is not None]
        if is_pair:
            gaps.append(max(rewards) - min(rewards))
    return {
        "rollout/pairs": Figure.of("sum", [sum(pairs)]),
        "rollout/groups_with_pair": Figure.ratio(sum(pairs), len(pairs)),
        "rollout/pair_mr_gap": Figure.of("mean", gaps),
    }
