"""Conversation-level metrics, and the arithmetic from their scores to the multiturn-aware reward."""

from collab_megatron.rollout.rewards import shipped as _shipped  # noqa: F401 - registers the shipped metrics
from collab_megatron.rollout.rewards.aggregate import (
    asks_question,
    clamped_shares,
    conversation_reward,
    multiturn_reward,
)
from collab_megatron.rollout.rewards.registry import (
    MetricContext,
    configured_scorer,
    judge_calls,
    make_scorer,
    register_metric,
)
from collab_megatron.rollout.rewards.scorer import Scorer

__all__ = [
    "MetricContext",
    "Scorer",
    "asks_question",
    "clamped_shares",
    "configured_scorer",
    "conversation_reward",
    "judge_calls",
    "make_scorer",
    "multiturn_reward",
    "register_metric",
]
