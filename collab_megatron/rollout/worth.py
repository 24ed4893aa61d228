"""The most LLM requests that a conversation or a tree may need, where no reply has to be asked for twice. Pure.

Every future goes on to its last turn.
"""

from __future__ import annotations

from collab_megatron.config.sections import EvaluationSection, RolloutSection


def tree_calls(rollout: RolloutSection, judges: int) -> int:
    """Of one conversation tree; `judges`: requests to the judges of a conversation (rewards/configured.py)."""
    futures = rollout.num_replies * max(rollout.num_repeat_rollouts, 1)
    turns = min(rollout.max_user_turns, rollout.max_assistant_turns - 1) if rollout.num_repeat_rollouts else 0
    return futures * (turns + judges)


def evaluation_calls(evaluation: EvaluationSection, judges: int) -> int:
    """Of one conversation of an evaluation."""
    return evaluation.max_assistant_turns - 1 + int(evaluation.simulated_opening) + judges
