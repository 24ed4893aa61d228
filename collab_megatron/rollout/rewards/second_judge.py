"""Second judge: another LLM scores a sample of the conversations again. Its scores are never part of a reward.

The policy learns what the first judge likes. Where the two judges come to disagree, or the first becomes more generous
than the second, the policy has learned the judge and not the task.
"""

from __future__ import annotations

import hashlib
import math

from collab_megatron.config.roles import SECOND_JUDGE, shipped_judges
from collab_megatron.config.sections import RewardSection, SimulatorsSection
from collab_megatron.rollout.llm import Gateway, SimulatorError
from collab_megatron.rollout.rewards.registry import make_scorer, prompt_files
from collab_megatron.rollout.rewards.scorer import Scorer
from collab_megatron.types import ScoredConversation


class SecondJudge:
    """Scores the conversations of a sample, drawn by sample index: a resume draws the same."""

    def __init__(self, scorer: Scorer, share: float) -> None:
        self._scorer, self._share = scorer, share

    def wants(self, sample_index: int) -> bool:
        """Whether the conversation belongs to the sample."""
        digest = hashlib.blake2b(f"second judge/{sample_index}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self._share * 2**64

    async def score(self, conversation: ScoredConversation) -> dict[str, float]:
        """Raw score by judged metric; empty if the judge gives none, which costs the conversation nothing.

        Waits for the judge's calls."""
        try:
            return await self._scorer.score(conversation)
        except SimulatorError:
            return {}  # counted in simulator/second_judge/failures


def configured_second_judge(
    reward: RewardSection, simulators: SimulatorsSection, gateway: Gateway
) -> SecondJudge | None:
    """The second judge of a config, with the prompts of the first; None without one."""
    if reward.second_judge is None:
        return None
    scorer = make_scorer(
        {name: reward.metric_weights[name] for name in shipped_judges(reward, simulators)},
        gateway.role(SECOND_JUDGE),
        accuracy_verifier=reward.accuracy_verifier,
        prompt_files=prompt_files(reward, simulators),
        interactivity_sees=reward.interactivity_sees,
    )
    return SecondJudge(scorer, reward.second_judge_share)


def second_judge_calls(reward: RewardSection, simulators: SimulatorsSection, conversations: int) -> int:
    """Requests to the second judge that `conversations` are expected to need, rounded up."""
    if reward.second_judge is None:
        return 0
    return math.ceil(conversations * reward.second_judge_share) * len(shipped_judges(reward, simulators))
