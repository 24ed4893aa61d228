"""The scorer that a config describes."""

from __future__ import annotations

from collab_megatron.config.roles import judge_role, own_metrics, shipped_judges
from collab_megatron.config.sections import RewardSection, SimulatorsSection
from collab_megatron.rollout.llm import Gateway
from collab_megatron.rollout.rewards.registry import make_scorer
from collab_megatron.rollout.rewards.scorer import Scorer


def judge_calls(reward: RewardSection, simulators: SimulatorsSection) -> int:
    """Requests to the judges of one conversation, where none has to be repeated. What metrics of the user's own ask is
    not known and counted as one request each; the budget learns better from the first conversations."""
    return len(shipped_judges(reward, simulators)) + len(own_metrics(reward))


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
