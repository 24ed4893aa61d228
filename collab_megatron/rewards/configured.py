"""The scorer that a config describes."""

from __future__ import annotations

from collab_megatron.config.sections import RewardSection, SimulatorsSection
from collab_megatron.rewards.registry import make_scorer
from collab_megatron.rewards.scorer import Scorer
from collab_megatron.simulators import Gateway


def configured_scorer(reward: RewardSection, simulators: SimulatorsSection, gateway: Gateway) -> Scorer:
    """Raises UserError for an unknown metric, one that lacks its judge, or a bad prompt file."""
    judge = simulators.judge
    return make_scorer(
        reward.metric_weights,
        None if judge is None else gateway.role("judge"),
        accuracy_verifier=reward.accuracy_verifier,
        judge_prompt_file=None if judge is None else judge.prompt_file,
        accuracy_prompt_file=reward.accuracy_prompt_file,
        metric_modules=reward.metric_modules,
        settings=reward.settings,
    )
