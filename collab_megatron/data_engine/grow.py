"""One conversation, grown turn by turn: candidates, their simulated futures, the best one kept.

At every turn the assistant proposes replies (one call), each is scored by its multiturn-aware reward over simulated
futures in which the same assistant plays the policy, and the best goes into the conversation. The first user turn of
the best reply's first future then continues the chat, so what was scored is also what happens next.

What the assistant thinks (data/thought_tags.py) is seen by nobody and stands in no row.
A failed future is dropped; a candidate without a scored future drops out; a turn without candidates fails the whole
conversation with SimulatorError.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from collab_megatron.data.thought_tags import split_thoughts
from collab_megatron.data_engine.problems import Problem
from collab_megatron.rollout.llm import SimulatorError, ends_chat
from collab_megatron.rollout.rewards import Scorer, multiturn_reward
from collab_megatron.types import (
    TERMINATION_SIGNAL,
    ChatLLM,
    Future,
    LLMRequest,
    Message,
    RolloutStatus,
    ScoredConversation,
    Task,
    UserSimulator,
)

SAMPLES_PER_PROBLEM = 1_000_000  # sample indices of one problem: no two simulated turns of a run share one


@dataclass(frozen=True)
class Growth:
    """The shape of the conversations."""

    num_candidates: int
    num_futures: int
    max_total_turns: int  # assistant turns of a conversation
    max_user_turns: int  # user turns inside a scored future
    system_prompt: str = ""
    termination_signal: str = TERMINATION_SIGNAL

    def calls_at_most(self, judges: int, *, opening: bool) -> int:
        """LLM requests of one conversation, where none has to be repeated; `judges`: those of one scored future."""
        future = 2 * self.max_user_turns + judges  # a user turn and the answer to it
        turn = self.num_candidates * (1 + self.num_futures * future) + 1  # some providers give a reply a request
        return int(opening) + self.max_total_turns * turn


@dataclass(frozen=True)
class Players:
    """Everybody a conversation needs."""

    assistant: ChatLLM
    user: UserSimulator
    scorer: Scorer
    count_tokens: Callable[[str], int]


@dataclass(frozen=True)
class Candidate:
    """One proposed reply and what came of it."""

    text: str
    futures_K: tuple[Future, ...]
    mr: float | None  # None: no future carries a score


async def grow_conversation(problem: Problem, growth: Growth, players: Players) -> list[dict[str, Any]]:
    """Flat CollabLLM rows of one conversation, one for each scored candidate of each turn; `score` is its MR.

    Waits for every call of the conversation; calls that do not depend on one another run at the same time.
    Raises SimulatorError if the conversation cannot be brought to an end.
    """
    samples = problem.index * SAMPLES_PER_PROBLEM
    task = problem.task
    chat = list(task.prompt)
    if growth.system_prompt:
        chat = [Message("system", growth.system_prompt), *(m for m in chat if m.role != "system")]
    if not task.prompt:
        opening = await players.user.reply(task, (), sample_index=samples)
        if ends_chat(opening, growth.termination_signal):
            raise SimulatorError("the simulated user ended the chat in its opening")
        chat.append(Message("user", opening))
    rows: list[dict[str, Any]] = []
    per_turn = growth.num_candidates * growth.num_futures
    for turn_id in range(growth.max_total_turns):
        first_sample = samples + 1 + turn_id * per_turn
        candidates = await _propose(task, chat, first_sample, growth, players)
        rows += [_row(problem, chat, turn_id, candidate) for candidate in candidates]
        best = max(candidates, key=lambda candidate: candidate.mr or 0.0)
        chat.append(Message("assistant", best.text))
        if turn_id + 1 == growth.max_total_turns:
            break
        user_text = await _next_user_turn(task, chat, best, first_sample, players)
        if ends_chat(user_text, growth.termination_signal):
            break
        chat.append(Message("user", user_text))
    return [{**row, "conv_rows": len(rows)} for row in rows]


async def _propose(
    task: Task, chat: Sequence[Message], first_sample: int, growth: Growth, players: Players
) -> list[Candidate]:
    """The distinct candidate replies to `chat` that could be scored. Raises SimulatorError if none could."""
    request = LLMRequest(chat, parse=str, sample_index=first_sample, n=growth.num_candidates)
    splits = [split_thoughts(reply.strip()) for reply in await players.assistant.complete(request)]
    texts = list(dict.fromkeys(split.reply for split in splits if split.closed and split.reply.strip()))
    if not texts:
        raise SimulatorError("the assistant proposed no reply: its answers are empty or end inside a thought")
    # One scoring for equal texts: they are the same reply, and scoring them twice doubles the calls for nothing.
    played = await asyncio.gather(
        *(
            _play_future(task, chat, text, k, first_sample + i * growth.num_futures + k, growth, players)
            for i, text in enumerate(texts)
            for k in range(growth.num_futures)
        )
    )
    candidates = []
    for i, text in enumerate(texts):
        futures_K = tuple(played[i * growth.num_futures : (i + 1) * growth.num_futures])
        candidates.append(Candidate(text, futures_K, multiturn_reward(futures_K)))
    scored = [candidate for candidate in candidates if candidate.mr is not None]
    if not scored:
        raise SimulatorError(f"no candidate could be scored; first error: {played[0].error}")
    return scored


async def _play_future(
    task: Task,
    chat: Sequence[Message],
    reply: str,
    index: int,
    sample_index: int,
    growth: Growth,
    players: Players,
) -> Future:
    """Play one future of `reply` and score it. Never raises SimulatorError: a failed call becomes the status."""
    messages = [*chat, Message("assistant", reply)]
    tokens = players.count_tokens(reply)
    status = RolloutStatus.MAX_TURNS
    try:
        for _ in range(growth.max_user_turns):
            user_text = await players.user.reply(task, messages, sample_index=sample_index)
            messages.append(Message("user", user_text))
            if ends_chat(user_text, growth.termination_signal):
                status = RolloutStatus.TERMINATED
                break
            request = LLMRequest(messages, parse=str, sample_index=sample_index)
            (turn,) = await players.assistant.complete(request)
            said = split_thoughts(turn.strip())
            messages.append(Message("assistant", said.reply))
            tokens += players.count_tokens(turn)
            if not said.closed or not said.reply.strip():  # nobody could answer it
                status = RolloutStatus.TRUNCATED
                break
    except SimulatorError as error:
        return Future(index, RolloutStatus.SIMULATOR_FAILED, tuple(messages[len(chat) + 1 :]), error=str(error))
    future = Future(index, status, tuple(messages[len(chat) + 1 :]), policy_tokens=tokens)
    try:
        scores = await players.scorer.score(
            ScoredConversation(task, tuple(messages), len(chat), policy_tokens=tokens, sample_index=sample_index)
        )
    except SimulatorError as error:
        return replace(future, status=RolloutStatus.JUDGE_FAILED, error=str(error))
    return replace(future, scores=scores, reward=players.scorer.reward(scores))


async def _next_user_turn(
    task: Task, chat: Sequence[Message], best: Candidate, sample_index: int, players: Players
) -> str:
    """The user's answer to the kept reply: from its first scored future, or asked for where futures have no users."""
    for future in best.futures_K:
        if future.status.scored and future.messages:
            return future.messages[0].content
    return await players.user.reply(task, chat, sample_index=sample_index)


def _row(problem: Problem, chat: Sequence[Message], turn_id: int, candidate: Candidate) -> dict[str, Any]:
    task = problem.task
    scored = [future for future in candidate.futures_K if future.status.scored]
    return {
        "prompt": [message.as_dict() for message in chat],
        "completion": candidate.text,
        "conv_id": problem.index,
        "turn_id": turn_id,
        "score": candidate.mr,
        "single_turn_prompt": task.single_turn_prompt,
        "single_turn_completion": task.ground_truth,
        "single_turn_metadata": dict(task.metadata),
        "task_desc": task.task_desc,
        "sessions": [[message.as_dict() for message in future.messages] for future in scored],
        "rewards": _mean_scores([future.scores for future in scored]),
    }


def _mean_scores(scores_K: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(scores[name] for scores in scores_K) / len(scores_K) for name in scores_K[0]}
