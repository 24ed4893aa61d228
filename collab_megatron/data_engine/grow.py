"""Grows one conversation of a dataset turn by turn: candidate replies, their simulated futures, the best one kept.

At every turn the assistant proposes replies, some of them under a prompt that shows it request and reference
(proactive.py). Each reply gets its multiturn-aware reward over simulated futures, in which the same assistant is the
policy and sees the chat alone. The best reply enters the conversation, and the first user turn of its first scored
future continues the chat, so the conversation goes the way that was scored.

Thoughts of the assistant (data/thought_tags.py) are in no row, and neither user nor judges see them. A failed future is
dropped, and so is a candidate without a scored future. A turn without candidates fails the whole conversation with
SimulatorError.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

from collab_megatron.concurrency import run_all
from collab_megatron.data.sessions import MR, whole_sessions
from collab_megatron.data.thought_tags import split_thoughts
from collab_megatron.data_engine.proactive import ProactivePrompt
from collab_megatron.data_engine.problems import Problem
from collab_megatron.rollout.conversation import Conversation, TurnLimits
from collab_megatron.rollout.first_turns import FirstTurns, UserTurnsTogether
from collab_megatron.rollout.llm import SimulatorError, ends_chat
from collab_megatron.rollout.rewards import Scorer, multiturn_reward
from collab_megatron.run_order import POSITION, RunPosition
from collab_megatron.types import (
    TERMINATION_SIGNAL,
    ChatLLM,
    Future,
    LLMRequest,
    Message,
    RolloutStatus,
    Task,
    UserSimulator,
)

SAMPLES_PER_PROBLEM = 1_000_000  # sample indices of one problem; no two futures of a build share one


@dataclass(frozen=True)
class GrowthRules:
    """Size and limits of the conversations."""

    num_candidates: int
    num_futures: int
    max_total_turns: int  # assistant turns of a conversation
    max_user_turns: int  # user turns inside a scored future
    num_proactive: int = 0  # of the candidates
    system_prompt: str = ""
    termination_signal: str = TERMINATION_SIGNAL

    @property
    def turn_limits(self) -> TurnLimits:
        """Limits of a scored future, in which the assistant answers every user turn."""
        return TurnLimits(
            max_user_turns=self.max_user_turns,
            max_assistant_turns=self.max_user_turns + 1,
            termination_signal=self.termination_signal,
        )

    def calls_at_most(self, judges: int, *, opening: bool) -> int:
        """The most LLM requests of one conversation, without retries; `judges`: those of one scored future."""
        future = 2 * self.max_user_turns + judges  # a user turn and the answer to it
        turn = self.num_candidates * (1 + self.num_futures * future) + 1  # some providers return one reply per request
        return int(opening) + self.max_total_turns * turn


@dataclass(frozen=True)
class BuildPlayers:
    """Everybody that grows a conversation."""

    assistant: ChatLLM
    user: UserSimulator
    scorer: Scorer
    count_tokens: Callable[[str], int]
    proactive: ProactivePrompt | None = None  # for GrowthRules.num_proactive candidates
    together: UserTurnsTogether | None = None  # `user`, where one request may bring the first turns of several futures


@dataclass(frozen=True)
class AssistantTurn:
    """One turn of the assistant, without its thought."""

    reply: str
    cut: bool  # it ended inside a thought
    num_tokens: int

    @property
    def broken(self) -> bool:
        return self.cut or not self.reply.strip()


class AssistantPolicy:
    """The policy of a simulated future: the LLM that proposes the replies."""

    failure = RolloutStatus.SIMULATOR_FAILED

    def __init__(self, players: BuildPlayers, sample_index: int) -> None:
        self._players, self._sample_index = players, sample_index

    async def answer(self, messages: Sequence[Message]) -> AssistantTurn:
        """Waits for one LLM call. Raises SimulatorError."""
        request = LLMRequest(messages, parse=str, sample_index=self._sample_index)
        (text,) = await self._players.assistant.complete(request)
        split = split_thoughts(text.strip())
        return AssistantTurn(split.reply, cut=not split.closed, num_tokens=self._players.count_tokens(text))


@dataclass(frozen=True)
class Candidate:
    """One proposed reply and its futures."""

    text: str
    proactive: bool  # written with request and reference in sight
    futures_K: tuple[Future, ...]
    mr: float | None  # None: no future has a score


async def grow_conversation(problem: Problem, rules: GrowthRules, players: BuildPlayers) -> list[dict[str, Any]]:
    """Flat CollabLLM rows of one conversation, one for each scored candidate of each turn; `score` is its MR.

    In the LLMs' queues earlier problems go first. Waits for every call of the conversation; independent calls run
    concurrently. Raises SimulatorError if the conversation cannot be finished.
    """
    samples = problem.index * SAMPLES_PER_PROBLEM
    POSITION.set(RunPosition(problem.index))
    task = problem.task
    chat = list(task.prompt)
    if rules.system_prompt:
        chat = [Message("system", rules.system_prompt), *(m for m in chat if m.role != "system")]
    if not task.prompt:
        opening = await players.user.reply(task, (), sample_index=samples)
        if ends_chat(opening, rules.termination_signal):
            raise SimulatorError("the simulated user ended the chat in its opening turn")
        chat.append(Message("user", opening))
    rows: list[dict[str, Any]] = []
    per_turn = rules.num_candidates * rules.num_futures
    for turn_id in range(rules.max_total_turns):
        first_sample = samples + 1 + turn_id * per_turn
        candidates = await _propose(task, chat, first_sample, rules, players)
        rows += [_row(problem, chat, turn_id, candidate) for candidate in candidates]
        best = max(candidates, key=lambda candidate: candidate.mr or 0.0)
        chat.append(Message("assistant", best.text))
        if turn_id + 1 == rules.max_total_turns:
            break
        user_text = await _next_user_turn(task, chat, best, first_sample, players)
        if ends_chat(user_text, rules.termination_signal):
            break
        chat.append(Message("user", user_text))
    return [{**row, "conv_rows": len(rows)} for row in rows]


async def _propose(
    task: Task, chat: Sequence[Message], first_sample: int, rules: GrowthRules, players: BuildPlayers
) -> list[Candidate]:
    """The distinct, scored candidate replies to `chat`. Waits for all their futures. Raises SimulatorError for none."""
    texts = await _candidate_texts(task, chat, first_sample, rules, players)
    if not texts:
        raise SimulatorError("the assistant proposed no reply: every answer is empty or ends inside a thought")
    async with AsyncExitStack() as closing:
        users: list[UserSimulator] = []
        samples_G_K = [
            [first_sample + i * rules.num_futures + k for k in range(rules.num_futures)] for i in range(len(texts))
        ]
        for samples_K in samples_G_K:
            users.append(players.user)
            if players.together is not None and rules.num_futures > 1:  # as in training (group_futures.py)
                users[-1] = turns = FirstTurns(players.user, players.together, samples_K)
                closing.push_async_callback(turns.close)
        played = await run_all(
            _play_future(task, chat, text, k, sample, rules, replace(players, user=user))
            for text, samples_K, user in zip(texts, samples_G_K, users, strict=True)
            for k, sample in enumerate(samples_K)
        )
    candidates = []
    for i, (text, proactive) in enumerate(texts.items()):
        futures_K = tuple(played[i * rules.num_futures : (i + 1) * rules.num_futures])
        candidates.append(Candidate(text, proactive, futures_K, multiturn_reward(futures_K)))
    scored = [candidate for candidate in candidates if candidate.mr is not None]
    if not scored:
        raise SimulatorError(f"no candidate could be scored; first error: {played[0].error}")
    return scored


async def _candidate_texts(
    task: Task, chat: Sequence[Message], sample_index: int, rules: GrowthRules, players: BuildPlayers
) -> dict[str, bool]:
    """The distinct replies -> whether only a proactive candidate gave it. Equal texts are one candidate: scoring them
    twice would only double the calls. Waits for the assistant's calls. Raises SimulatorError."""
    calls = []
    if plain := rules.num_candidates - rules.num_proactive:
        calls.append(LLMRequest(chat, parse=str, sample_index=sample_index, n=plain))
    if rules.num_proactive:
        assert players.proactive is not None, "proactive candidates need their prompt"
        calls.append(players.proactive.request(task, chat, sample_index=sample_index, n=rules.num_proactive))
    texts: dict[str, bool] = {}
    answers = await run_all(players.assistant.complete(call) for call in calls)
    for call, replies in zip(calls, answers, strict=True):
        for split in (split_thoughts(reply.strip()) for reply in replies):
            if split.closed and split.reply.strip():
                texts.setdefault(split.reply, call.json_reply)
    return texts


async def _play_future(
    task: Task,
    chat: Sequence[Message],
    reply: str,
    index: int,
    sample_index: int,
    rules: GrowthRules,
    players: BuildPlayers,
) -> Future:
    """Play future `index` of `reply` and score it. A failed call is a status. Waits for assistant, user and judges."""
    opening = AssistantTurn(reply, cut=False, num_tokens=players.count_tokens(reply))
    conversation = Conversation(task, chat, opening, sample_index=sample_index)
    try:
        status = await conversation.play(players.user, AssistantPolicy(players, sample_index), rules.turn_limits)
        scores = await conversation.score(players.scorer)
    except SimulatorError as error:
        return conversation.future(index, conversation.waiting_for, str(error))
    return replace(conversation.future(index, status), scores=scores, reward=players.scorer.reward(scores))


async def _next_user_turn(
    task: Task, chat: Sequence[Message], best: Candidate, sample_index: int, players: BuildPlayers
) -> str:
    """The user's answer to the kept reply: from its first scored future, or a new call if it has no user turns."""
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
        "proactive": candidate.proactive,
        "single_turn_prompt": task.single_turn_prompt,
        "single_turn_completion": task.ground_truth,
        "single_turn_metadata": dict(task.metadata),
        "task_desc": task.task_desc,
        "sessions": whole_sessions(chat, candidate.text, [future.messages for future in scored]),
        "rewards": _scores(scored),
    }


def _scores(scored_K: Sequence[Future]) -> dict[str, list[float | None]]:
    """Metric -> its score in each session, and the sessions' rewards R*, whose mean is the row's score."""
    scores: dict[str, list[float | None]] = {
        name: [future.scores[name] for future in scored_K] for name in scored_K[0].scores
    }
    return {**scores, MR: [future.reward for future in scored_K]}
