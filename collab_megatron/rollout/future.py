"""One future: the rest of a conversation after a sampled reply, played by the policy in training, then scored.

Token-in, token-out: the policy's context is a list of ids that only grows. A sampled reply enters the context as it was
sampled, followed by the chat template's glue around the user's text.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from collab_megatron.concurrency import run_all
from collab_megatron.errors import BudgetSpent, NoEngineLeft, RunError
from collab_megatron.rollout.busy import BusyClock
from collab_megatron.rollout.conversation import Conversation, ConversationScorer, Policy, TurnLimits
from collab_megatron.rollout.first_turns import UserTurnsTogether
from collab_megatron.rollout.journal.store import ReplayMiss
from collab_megatron.rollout.llm.accounting import CALLS
from collab_megatron.rollout.rewards.scorer import DETAILS, is_of_own_metric
from collab_megatron.rollout.rewards.second_judge import SecondJudge
from collab_megatron.rollout.unexpected_errors import UnexpectedErrors
from collab_megatron.types import (
    CallRecord,
    Future,
    Generation,
    Message,
    PolicyEngine,
    PolicyTurn,
    RolloutStatus,
    Task,
    UserSimulator,
)


class Chat(Protocol):
    """The chat template as the driver needs it (data/chat.py)."""

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]: ...
    def grow(self, context_ids: Sequence[int], messages: Sequence[Message], user_text: str) -> list[int]: ...
    def policy_turn(
        self, context_ids: Sequence[int], generation: Generation, *, begin_s: float, end_s: float
    ) -> PolicyTurn: ...


STOPS_ALL = (NoEngineLeft, ReplayMiss, BudgetSpent)
"""Errors that are not about one conversation: they end the step or the run."""

NO_IDS = "the engine returned no token ids"


@dataclass(frozen=True, kw_only=True)
class Limits(TurnLimits):
    """Limits of a policy that an engine samples."""

    max_new_tokens: int  # per policy turn
    max_context_tokens: int  # of engine and model
    temperature: float
    future_timeout_s: float = 600.0  # deadline of one future
    cut_penalty: float = -1.0  # reward of a conversation that breaks off under `cut_reply: penalty`
    keep_contexts: bool = False  # futures keep the token ids before each of their policy turns, for tree credit


@dataclass(frozen=True)
class Players:
    """Everybody a conversation needs, with a clock for each kind of wait."""

    engine: PolicyEngine
    user: UserSimulator
    scorer: ConversationScorer
    chat: Chat
    engine_clock: BusyClock
    user_clock: BusyClock
    judge_clock: BusyClock
    unexpected: UnexpectedErrors = field(default_factory=UnexpectedErrors)
    second_judge: SecondJudge | None = None  # scores a sample again
    together: UserTurnsTogether | None = None  # `user`, where it can write several turns in one request


async def play_future(
    task: Task,
    prompt_ids: Sequence[int],
    reply: PolicyTurn,
    *,
    index: int,
    name: str,
    sample_index: int,
    simulate: bool,
    limits: Limits,
    players: Players,
    policy: Policy[PolicyTurn] | None = None,
) -> Future:
    """Play and score future `index` of a reply with `policy`, or with the engine's where it is None. A failed call, the
    deadline and an unexpected exception are statuses.

    `name` is unique in the run and names the policy turns in the journal. With `simulate` False (K = 0) the reply is
    scored as it is. A conversation that breaks off under `cut_reply: penalty` has a reward and no scores.

    Waits for user simulator, engine and judges in turn, at most `limits.future_timeout_s`. Raises STOPS_ALL and a bug
    of the user's own metric.
    """
    calls: list[CallRecord] = []
    before = CALLS.set(calls)
    details: dict[str, Mapping[str, Any]] = {}
    before_details = DETAILS.set(details)
    conversation = Conversation(task, task.prompt, reply, sample_index=sample_index)
    if policy is None:
        policy = EnginePolicy(task, prompt_ids, reply, name=name, limits=limits, players=players)
    try:
        async with asyncio.timeout(limits.future_timeout_s) as deadline:
            future = await _play(conversation, policy, index, simulate=simulate, limits=limits, players=players)
    except STOPS_ALL:
        raise
    except RunError as error:
        future = conversation.future(index, conversation.waiting_for, str(error))
    except Exception as error:
        if isinstance(error, TimeoutError) and deadline.expired():
            future = conversation.future(index, RolloutStatus.TIMED_OUT, f"over {limits.future_timeout_s:g} s")
        elif is_of_own_metric(error):
            raise
        else:
            words = players.unexpected.note(error, f"future {name} of task {task.task_id}")
            future = conversation.future(index, RolloutStatus.UNEXPECTED_ERROR, words)
    finally:
        CALLS.reset(before)
        DETAILS.reset(before_details)
    versions = [version for turn in conversation.turns for version in turn.generation.versions_T]
    return replace(
        future,
        versions=(min(versions), max(versions)) if versions else (0, 0),
        details=details,
        turns=tuple(conversation.turns[1:]),
        contexts=tuple(policy.contexts[: len(conversation.turns) - 1]) if isinstance(policy, EnginePolicy) else (),
        calls=tuple(calls),
    )


async def _play(
    conversation: Conversation[PolicyTurn],
    policy: Policy[PolicyTurn],
    index: int,
    *,
    simulate: bool,
    limits: Limits,
    players: Players,
) -> Future:
    if not conversation.turns[0].generation.token_ids_T:
        return conversation.future(index, RolloutStatus.ENGINE_FAILED, NO_IDS)
    if simulate:
        status = await conversation.play(players.user, policy, limits, user_clock=players.user_clock)
    else:
        status = conversation.standing(limits)
    played = conversation.future(index, status)
    if limits.cut_reply == "penalty" and limits.breaks_off(conversation.turns[-1]):
        return replace(played, reward=limits.cut_penalty)
    finished, second = conversation.finished(), players.second_judge
    with players.judge_clock:
        if second is None or not second.wants(finished.sample_index):
            scores, others = await conversation.score(players.scorer), dict[str, float]()
        else:
            scores, others = await run_all([conversation.score(players.scorer), second.score(finished)])
    return replace(played, scores=scores, second_scores=others, reward=players.scorer.reward(scores))


class EnginePolicy:
    """The policy in training, in one conversation: a growing list of token ids, sampled by the engine."""

    failure = RolloutStatus.ENGINE_FAILED

    def __init__(
        self,
        task: Task,
        prompt_ids: Sequence[int],
        reply: PolicyTurn,
        *,
        name: str,
        limits: Limits,
        players: Players,
    ) -> None:
        self._affinity, self._name = task.task_id, name
        self._limits, self._players = limits, players
        self._sampled = list(task.prompt)  # the messages with the policy's thoughts, as the chat template needs them
        self._context = list(prompt_ids)
        self._turns = 0
        self.contexts: list[tuple[int, ...]] = []  # of the turns after the reply, with limits.keep_contexts
        self._add(reply)

    async def answer(self, messages: Sequence[Message]) -> PolicyTurn | None:
        """Waits for the engine. Raises RunError for a turn without token ids, and what the engine raises."""
        user = messages[-1]
        self._context = self._players.chat.grow(self._context, tuple(self._sampled), user.content)
        self._sampled.append(user)
        if len(self._context) + self._limits.max_new_tokens > self._limits.max_context_tokens:
            return None
        if self._limits.keep_contexts:
            self.contexts.append(tuple(self._context))
        (turn,) = await ask_policy(
            self._context,
            1,
            affinity=self._affinity,
            name=f"{self._name}/{self._turns}",
            limits=self._limits,
            players=self._players,
        )
        if not turn.generation.token_ids_T:
            raise RunError(NO_IDS)
        self._add(turn)
        return turn

    def _add(self, turn: PolicyTurn) -> None:
        self._sampled.append(Message("assistant", turn.sampled))
        self._context += turn.generation.token_ids_T
        self._turns += 1


async def ask_policy(
    context_ids: Sequence[int], count: int, *, affinity: str, name: str, limits: Limits, players: Players
) -> list[PolicyTurn]:
    """`count` turns after `context_ids`; `affinity` and `name` as for PolicyEngine.generate.

    A turn without token ids is a failed request of its own. Waits for the engine. Raises what the engine raises.
    """
    begin_s = time.time()
    with players.engine_clock:
        generations = await players.engine.generate(
            context_ids,
            n=count,
            temperature=limits.temperature,
            max_new_tokens=limits.max_new_tokens,
            affinity=affinity,
            name=name,
        )
    end_s = time.time()
    return [players.chat.policy_turn(context_ids, each, begin_s=begin_s, end_s=end_s) for each in generations]
