"""Second judge: another LLM scores a sample of the conversations again. Its scores are never part of a reward.

The policy learns what the first judge likes. Where the two judges come to disagree, or the first becomes more generous
than the second, the policy has learned the judge and not the task. The second judge also says whether an opening leaves
anything out, where the dataset does not: a question is needless where nothing is missing.
"""

from __future__ import annotations

import hashlib
import math

from collab_megatron.concurrency import run_all
from collab_megatron.config.roles import SECOND_JUDGE, compared_metrics
from collab_megatron.config.sections import RewardSection, SimulatorsSection
from collab_megatron.rollout.llm import Gateway, SimulatorError
from collab_megatron.rollout.llm.parsing import json_object, object_schema, verdict_field
from collab_megatron.rollout.llm.templates import chat_lines, load_template
from collab_megatron.rollout.rewards.registry import make_scorer, prompt_files
from collab_megatron.rollout.rewards.scorer import DETAILS, Scorer
from collab_megatron.types import ChatLLM, LLMRequest, Message, ScoredConversation

OPENING_COMPLETE = "opening_complete"
"""Name among the second scores: 1 if the opening leaves nothing out, else 0."""
OPENING_SCHEMA = object_schema(thought="string", complete="boolean")


class SecondJudge:
    """Scores the conversations of a sample, drawn by sample index: a resume draws the same."""

    def __init__(self, scorer: Scorer, share: float, llm: ChatLLM | None = None) -> None:
        """`llm`: judges openings; None: nobody does."""
        self._scorer, self._share, self._llm = scorer, share, llm
        self._template = load_template("judge_opening", None, required=("request", "chat"))

    def wants(self, sample_index: int) -> bool:
        """Whether the conversation belongs to the sample."""
        digest = hashlib.blake2b(f"second judge/{sample_index}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self._share * 2**64

    async def score(self, conversation: ScoredConversation) -> dict[str, float]:
        """Raw score by judged metric, and OPENING_COMPLETE if the conversation begins with an opening of which the
        dataset does not tell. Empty if the judge fails, which costs the conversation nothing.

        Waits for the judge's calls."""
        before = DETAILS.set(None)  # those of the first judges stay
        try:
            scores, opening = await run_all([self._scorer.score(conversation), self._opening(conversation)])
        except SimulatorError:
            return {}  # counted in simulator/second_judge/failures
        finally:
            DETAILS.reset(before)
        return {**scores, **opening}

    async def _opening(self, conversation: ScoredConversation) -> dict[str, float]:
        task = conversation.task
        opening = [message for message in task.prompt if message.role == "user"]
        if self._llm is None or task.ambiguous is not None or len(opening) != 1:
            return {}
        prompt = self._template.fill(request=task.single_turn_prompt, chat=chat_lines(opening))
        request = LLMRequest(
            [Message("user", prompt)],
            parse=read_complete,
            sample_index=conversation.sample_index,
            json_reply=True,
            schema=OPENING_SCHEMA,
        )
        (complete,) = await self._llm.complete(request)
        return {OPENING_COMPLETE: float(complete)}


def read_complete(text: str) -> bool:
    """The judge's `complete`. Raises MalformedReply."""
    return verdict_field(json_object(text), "complete")


def configured_second_judge(
    reward: RewardSection, simulators: SimulatorsSection, gateway: Gateway
) -> SecondJudge | None:
    """The second judge of a config, with the prompts of the first; None without one."""
    if reward.second_judge is None:
        return None
    llm = gateway.role(SECOND_JUDGE)
    compared = compared_metrics(reward, simulators)
    scorer = make_scorer(
        {name: reward.metric_weights[name] for name in compared},
        llm,
        accuracy_verifier=reward.accuracy_verifier,
        prompt_files=prompt_files(reward, simulators),
        interactivity_sees=reward.interactivity_sees,
        settings={name: reward.settings[name] for name in compared if name in reward.settings},
    )
    return SecondJudge(scorer, reward.second_judge_share, llm)


def second_judge_calls(reward: RewardSection, simulators: SimulatorsSection, conversations: int) -> int:
    """Requests to the second judge that `conversations` are expected to need, rounded up."""
    if reward.second_judge is None:
        return 0
    return math.ceil(conversations * reward.second_judge_share) * (len(compared_metrics(reward, simulators)) + 1)
