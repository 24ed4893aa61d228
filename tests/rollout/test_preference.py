"""Preference pairs of online DPO: best against worst reward, and the groups that give none."""

from __future__ import annotations

from dataclasses import replace

from collab_megatron.config.sections import PreferenceSection
from collab_megatron.figures import values
from collab_megatron.rollout.group import GroupRules, with_advantages
from collab_megatron.rollout.preference import preference_figures, preference_pair
from collab_megatron.types import Group, Reply
from tests.rollout.fakes import TASK, generation, policy_turn

RULES = PreferenceSection()
GROUPS = GroupRules(
    num_replies=4,
    num_futures=2,
    min_replies=2,
    min_futures=1,
    group_timeout_s=60,
    advantage_eps=0.05,
    min_group_std=0.01,
)


def group(**rewards: float | None) -> Group:
    """Replies by text; the reward of each."""
    replies = tuple(Reply(policy_turn(text), (), mr=reward) for text, reward in rewards.items())
    return with_advantages(Group(TASK, (1, 2), replies, kept=True), GROUPS)


def trained(found: Group, rules: PreferenceSection = RULES) -> list[tuple[int, ...]]:
    return [sample.reply_ids_T for sample in preference_pair(found, rules)]


def ids(*texts: str) -> list[tuple[int, ...]]:
    return [generation(text).token_ids_T for text in texts]


def test_the_best_reply_comes_first_and_the_worst_second() -> None:
    found = group(fair=0.5, best=1.5, failed=None, worst=-0.5, good=1.0)
    assert trained(found) == ids("best", "worst")
    chosen, rejected = preference_pair(found, RULES)
    assert chosen.prompt_ids == rejected.prompt_ids == (1, 2)
    assert chosen.advantage > 0 > rejected.advantage
    assert trained(group(b=1.0, a=1.0, d=0.0, c=0.0)) == ids("b", "d")  # of equal rewards the first


def test_a_longer_reply_that_loses_reward_is_the_worse_one() -> None:
    """As in the advantages: overlong shaping decides between replies with one multiturn-aware reward."""
    rules = replace(GROUPS, overlong_share=0.5, overlong_penalty=1.0, longest=len(generation("aaaa").token_ids_T))
    found = with_advantages(replace(group(aaaa=1.0, b=1.0), kept=True), rules)
    assert trained(found) == ids("b", "aaaa")


def test_groups_without_a_pair() -> None:
    assert trained(group(a=1.0, b=1.0, c=1.0)) == []
    assert trained(group(a=1.0, b=None)) == []  # dropped: one reply with a reward
    assert trained(group(a=1.0, b=0.75), PreferenceSection(min_gap=0.25)) == []
    assert trained(group(a=1.0, b=0.75), PreferenceSection(min_gap=0.2)) == ids("a", "b")
    twins = group(a=1.0, b=0.0)
    twins = replace(twins, replies_G=tuple(replace(reply, turn=policy_turn("a")) for reply in twins.replies_G))
    assert trained(twins) == []


def test_figures_of_the_pairs() -> None:
    groups = [group(a=1.0, b=0.0), group(a=0.5, b=None, c=0.25, d=0.25), group(a=1.0, b=1.0), group(a=1.0, b=None)]
    assert values(preference_figures(groups, RULES)) == {
        "rollout/pairs": 2,
        "rollout/groups_with_pair": 0.5,
        "rollout/pair_mr_gap": 0.625,
    }
    assert values(preference_figures(groups[2:], RULES)) == {"rollout/pairs": 0, "rollout/groups_with_pair": 0}
