"""The scorer that a config describes."""

from __future__ import annotations

from collab_megatron.config.entry import judge_role, shipped_judges
from collab_megatron.config.sections import RewardSection, SimulatorsSection
from collab_megatron.rollout.llm import Gateway
from collab_megatron.rollout.rewards.registry import make_scorer
from collab_megatron.rollout.rewards.scorer import Scorer

ASK_NOBODY = ("accuracy", "token_amount")
"""Shipped metrics that ask no LLM; `accuracy` with a judge is among shipped_judges."""


def judge_calls(reward: RewardSection, simulators: SimulatorsSection) -> int:
    """Requests to the judges of one conversation, where none has to be repeated. What metrics of the user's own ask is
    not known and counted as one request each; the budget learns better from the first conversations."""
    judged = shipped_judges(reward, simulators)
    return len(judged) + sum(name not in judged and name not in ASK_NOBODY for name in reward.metric_weights)


def configured_scorer(reward: RewardSection, simulators: SimulatorsSection, gateway: Gateway) -> Scorer:
    """Raises UserError for an unknown metric, one that lacks its judge, or a bad prompt file."""
    judge = simulators.judge
    own = {name: section for name, section in reward.judges.items() if name in reward.metric_weights}
    return make_scorer(
        reward.metric_weights,
        None if judge is None else gateway.role("judge"),
        accuracy_verifier=reward.accuracy_verifier,
        judges={name: gateway.role(judge_role(name)) for name in own},
        prompt_files={
            "interactivity": None if judge is None else judge.prompt_file,
            "accuracy": reward.accuracy_prompt_file,
            **{name: section.prompt_file for name, section in own.items() if section.prompt_file is not None},
        },
        interactivity_sees=reward.interactivity_sees,
        metric_modules=reward.metric_modules,
        settings=reward.settings,
    )
