"""Which LLMs a config names: the roles of the gateway, the players of a conversation, the judges of the metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from collab_megatron.config.sections import (
    ComparedModelSection,
    EvaluationSection,
    LLMSection,
    RewardSection,
    SimulatorSection,
    SimulatorsSection,
    UserSection,
)
from collab_megatron.config.sections.llm import ROLES

JUDGE_OF = "judge-"  # begins the role of a metric's own judge
SECOND_JUDGE = "second_judge"  # the role of reward.second_judge
USER_OF = "user-"  # begins the role of a further user of the evaluation
MODEL_OF = "model-"  # begins the role of an API model that is evaluated
PAIR_JUDGE = "pair_judge"  # the role in simulators.roles that compares two conversations
EXTRACTOR = "extractor"  # the role in simulators.roles that extracts documents and code
EXTRACTING_METRICS = ("bleu_score", "pass_rate")
JUDGED_METRICS = ("accuracy", "interactivity", "judge", *EXTRACTING_METRICS)
SHIPPED_METRICS = (*JUDGED_METRICS, "token_amount", "turn_count")


def llm_roles(simulators: SimulatorsSection, reward: RewardSection) -> dict[str, LLMSection]:
    """The configured roles by name. A metric's own judge is `judge-METRIC`, if the metric has a weight."""
    named: dict[str, Any] = {"user": simulators.user, "judge": simulators.judge, "assistant": simulators.assistant}
    named[SECOND_JUDGE] = reward.second_judge
    roles = {role: section for role, section in named.items() if section is not None}
    own = {judge_role(metric): judge for metric, judge in reward.judges.items() if metric in reward.metric_weights}
    return roles | dict(simulators.roles) | own


def evaluation_roles(
    evaluation: EvaluationSection, models: Mapping[str, ComparedModelSection] | None = None
) -> dict[str, LLMSection]:
    """The roles that only an evaluation has: its further users, and the API models in the place of the policy."""
    users = {f"{USER_OF}{name}": section for name, section in evaluation.users.items()}
    apis = {f"{MODEL_OF}{name}": row.api for name, row in (models or {}).items() if row.api is not None}
    return {**users, **apis}


def as_user(section: LLMSection, termination_signal: str) -> UserSection:
    """A further user of the evaluation as simulators.user, so that it can take its place."""
    return UserSection.model_validate({**section.model_dump(), "termination_signal": termination_signal})


def llms_of_evaluation(
    evaluation: EvaluationSection, models: Mapping[str, ComparedModelSection] | None = None
) -> dict[str, LLMSection]:
    """Key in the config -> an LLM of `evaluation_roles`."""
    return {role_place(role): section for role, section in evaluation_roles(evaluation, models).items()}


def llms_of_conversations(simulators: SimulatorsSection, reward: RewardSection) -> dict[str, LLMSection]:
    """Key in the config -> an LLM that a conversation of the policy waits for."""
    roles = {role: section for role, section in llm_roles(simulators, reward).items() if role != "assistant"}
    return {role_place(role): section for role, section in roles.items()} | user_places(simulators.user)


def user_places(user: UserSection) -> dict[str, SimulatorSection]:
    """Key in the config -> each simulated user of the mixture.

    Example: {"simulators.user": ..., "simulators.user.mixture.0": ...}
    """
    first: dict[str, SimulatorSection] = {"simulators.user": user}
    return first | {f"simulators.user.mixture.{number}": other for number, other in enumerate(user.mixture)}


def judge_role(metric: str) -> str:
    """The role of a metric's own judge."""
    return f"{JUDGE_OF}{metric}"


def role_place(role: str) -> str:
    """The key in the config of a role of `llm_roles` or `evaluation_roles`."""
    if role == SECOND_JUDGE:
        return "reward.second_judge"
    if role.startswith(USER_OF):
        return f"evaluation.users.{role.removeprefix(USER_OF)}"
    if role.startswith(MODEL_OF):
        return f"models.{role.removeprefix(MODEL_OF)}.api"
    if role.startswith(JUDGE_OF):
        return f"reward.judges.{role.removeprefix(JUDGE_OF)}"
    return f"simulators.{role}" if role in ROLES else f"simulators.roles.{role}"


def role_of_metric(metric: str, reward: RewardSection, simulators: SimulatorsSection) -> str:
    """The role that a metric asks: its own judge, the extractor, or the judge of all."""
    if metric in reward.judges:
        return judge_role(metric)
    return EXTRACTOR if metric in EXTRACTING_METRICS and EXTRACTOR in simulators.roles else "judge"


def shipped_judges(reward: RewardSection, simulators: SimulatorsSection) -> dict[str, LLMSection | None]:
    """The LLM of each weighted, shipped metric that asks one; None where none is configured for it."""
    roles = llm_roles(simulators, reward)
    return {
        name: roles.get(role_of_metric(name, reward, simulators))
        for name in JUDGED_METRICS
        if name in reward.metric_weights and not (name == "accuracy" and reward.accuracy_verifier == "exact")
    }


def compared_metrics(reward: RewardSection, simulators: SimulatorsSection) -> list[str]:
    """The weighted, shipped metrics that the second judge scores again: those whose score is a judge's opinion."""
    return [name for name in shipped_judges(reward, simulators) if name not in EXTRACTING_METRICS]


def own_metrics(reward: RewardSection) -> list[str]:
    """The weighted metrics that the user registered."""
    return [name for name in reward.metric_weights if name not in SHIPPED_METRICS]
