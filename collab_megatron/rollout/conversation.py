"""One future: the rest of a conversation after a reply, played until the user ends it or the turn limits are reached.

Token-in, token-out: the policy's context is a list of ids that only grows. A sampled reply enters it as it was sampled;
what follows is the chat template's glue around the user's text. Text is made of ids for simulator and judge alone, and
of a policy turn they are given the reply, never the thought.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from collab_megatron.config.sections.rollout import CutReply
from collab_megatron.errors import BudgetSpent, NoEngineLeft, RunError
from collab_megatron.rollout.busy import BusyClock
from collab_megatron.rollout.journal.store import ReplayMiss
from collab_megatron.rollout.llm.accounting import CALLS
from collab_megatron.rollout.rewards.scorer import is_of_own_metric
from collab_megatron.rollout.unexpected import Unexpected
from collab_megatron.run_order import POSITION, RunPosition
from collab_megatron.types import (
    TERMINATION_SIGNAL,
    CallRecord,
    Future,
    Generation,
    Message,
    PolicyEngine,
    PolicyTurn,
    RolloutStatus,
    ScoredConversation,
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


class ConversationScorer(Protocol):
    """All metrics of one conversation (rewards/scorer.py)."""

    async def score(self, conversation: ScoredConversation) -> dict[str, float]: ...
    def reward(self, scores: dict[str, float]) -> float: ...


STOPS_ALL = (NoEngineLeft, ReplayMiss, BudgetSpent)
"""Say nothing of the conversation they were met in: they end the work, not one future of it."""

NO_IDS = "the engine returned no token ids"


@dataclass(frozen=True)
class Seat:
    """Where a future sits in the run."""

    name: str  # unique in the run: names its policy turns in the journal
    sample_index: int  # unique in the run: tells the simulator's calls with the same chat apart
    step: int = 0  # who goes first at a queue


@dataclass(frozen=True)
class Limits:
    """Where a conversation ends."""

    max_user_turns: int  # user turns after the reply
    max_assistant_turns: int  # policy turns, the reply included
    max_new_tokens: int  # per policy turn
    max_context_tokens: int  # what engine and model can hold
    temperature: float
    future_timeout_s: float = 600.0  # deadline of one future
    cut_reply: CutReply = "score"  # what becomes of a conversation whose policy turn is cut or empty
    cut_penalty: float = -1.0  # its reward under `penalty`
    termination_signal: str = TERMINATION_SIGNAL  # a user turn that holds it is the last

    def breaks_off(self, turn: PolicyTurn) -> bool:
        """Whether the conversation ends with `turn`, because nobody could answer it."""
        return turn.broken and self.cut_reply != "play"


@dataclass(frozen=True)
class Players:
    """Everybody a conversation needs, and the clocks that tell how long each was waited for."""

    engine: PolicyEngine
    user: UserSimulator
    scorer: ConversationScorer
    chat: Chat
    engine_clock: BusyClock
    user_clock: BusyClock
    judge_clock: BusyClock
    unexpected: Unexpected = field(default_factory=Unexpected)


@dataclass
class _State:
    """The conversation as it grows."""

    messages: list[Message]  # as its user sees it
    sampled: list[Message]  # the same with the thoughts of the policy: as the chat template is given it
    context: list[int]
    last: PolicyTurn
    policy_tokens: int = 0
    versions: list[int] = field(default_factory=list)
    turns: list[PolicyTurn] = field(default_factory=list)  # after the reply
    user_turns: int = 0
    assistant_turns: int = 0

    def add_user(self, text: str) -> None:
        self.messages.append(Message("user", text))
        self.sampled.append(Message("user", text))
        self.user_turns += 1

    def add_policy(self, turn: PolicyTurn) -> None:
        self.messages.append(Message("assistant", turn.reply))
        self.sampled.append(Message("assistant", turn.sampled))
        self.context += turn.generation.token_ids_T
        self.policy_tokens += len(turn.generation.token_ids_T)
        self.versions += turn.generation.versions_T
        self.assistant_turns += 1
        self.last = turn


async def play_future(
    task: Task,
    prompt_ids: Sequence[int],
    reply: PolicyTurn,
    *,
    index: int,
    seat: Seat,
    simulate: bool,
    limits: Limits,
    players: Players,
) -> Future:
    """Play and score future `index` of a reply. A failed call becomes its status, and so do its deadline and an
    exception that nobody foresaw. Raised are only NoEngineLeft, ReplayMiss and a bug of the user's own metric.

    With `simulate` False (K = 0) the reply is scored as it stands. A conversation that broke off under
    `cut_reply: penalty` has a reward and no scores. Waits for the engine, the user simulator and the
    judges in turn.
    """
    state = _State(messages=list(task.prompt), sampled=list(task.prompt), context=list(prompt_ids), last=reply)
    state.add_policy(reply)
    calls: list[CallRecord] = []
    before = CALLS.set(calls)
    try:
        played = await _play(task, state, index, seat, simulate=simulate, limits=limits, players=players)
    except STOPS_ALL:
        raise
    except Exception as error:
        if is_of_own_metric(error):
            raise
        words = players.unexpected.note(error, f"future {seat.name} of task {task.task_id}")
        played = _future(task, state, index, RolloutStatus.UNEXPECTED_ERROR, words)
    finally:
        CALLS.reset(before)
    return replace(played, calls=tuple(calls))


async def _play(
    task: Task, state: _State, index: int, seat: Seat, *, simulate: bool, limits: Limits, players: Players
) -> Future:
    if not state.last.generation.token_ids_T:
        return _future(task, state, index, RolloutStatus.ENGINE_FAILED, NO_IDS)
    try:
        async with asyncio.timeout(limits.future_timeout_s) as deadline:
            status, error = RolloutStatus.MAX_TURNS, ""
            if simulate:
                status, error = await _simulate(task, state, seat, limits, players)
            elif state.last.cut or limits.breaks_off(state.last):
                status = RolloutStatus.TRUNCATED
            played = _future(task, state, index, status, error)
            if limits.cut_reply == "penalty" and limits.breaks_off(state.last):
                return replace(played, reward=limits.cut_penalty)
            return await _score(task, state, seat, played, players) if status.scored else played
    except TimeoutError:
        if not deadline.expired():
            raise  # somebody else's: a defect, and no sign of a slow conversation
        return _future(task, state, index, RolloutStatus.TIMED_OUT, f"over {limits.future_timeout_s:g} s")


def _future(task: Task, state: _State, index: int, status: RolloutStatus, error: str) -> Future:
    return Future(
        index=index,
        status=status,
        messages=tuple(state.messages[len(task.prompt) + 1 :]),
        policy_tokens=state.policy_tokens,
        versions=(min(state.versions), max(state.versions)) if state.versions else (0, 0),
        error=error,
        turns=tuple(state.turns),
    )


async def _simulate(
    task: Task, state: _State, seat: Seat, limits: Limits, players: Players
) -> tuple[RolloutStatus, str]:
    while state.user_turns < limits.max_user_turns and state.assistant_turns < limits.max_assistant_turns:
        if limits.breaks_off(state.last):
            return RolloutStatus.TRUNCATED, ""
        POSITION.set(RunPosition(seat.step, state.user_turns + state.assistant_turns))
        try:
            with players.user_clock:
                user_text = await players.user.reply(task, state.messages, sample_index=seat.sample_index)
        except STOPS_ALL:
            raise
        except RunError as error:
            return RolloutStatus.SIMULATOR_FAILED, str(error)
        history = tuple(state.sampled)
        state.add_user(user_text)
        if limits.termination_signal in user_text:
            return RolloutStatus.TERMINATED, ""
        state.context = players.chat.grow(state.context, history, user_text)
        if len(state.context) + limits.max_new_tokens > limits.max_context_tokens:
            return RolloutStatus.TRUNCATED, ""
        POSITION.set(RunPosition(seat.step, state.user_turns + state.assistant_turns))
        try:
            (turn,) = await ask_policy(
                state.context,
                1,
                affinity=task.task_id,
                name=f"{seat.name}/{state.assistant_turns}",
                limits=limits,
                players=players,
            )
        except STOPS_ALL:
            raise
        except RunError as error:
            return RolloutStatus.ENGINE_FAILED, str(error)
        if not turn.generation.token_ids_T:
            return RolloutStatus.ENGINE_FAILED, NO_IDS
        state.add_policy(turn)
        state.turns.append(turn)
    cut = state.last.cut or limits.breaks_off(state.last)
    return (RolloutStatus.TRUNCATED if cut else RolloutStatus.MAX_TURNS), ""


async def ask_policy(
    context_ids: Sequence[int], count: int, *, affinity: str, name: str, limits: Limits, players: Players
) -> list[PolicyTurn]:
    """`count` turns after `context_ids`; `affinity` and `name` as for PolicyEngine.generate, which is waited for.

    A turn without token ids is a failed request of its own. Raises what the engine raises.
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


async def _score(task: Task, state: _State, seat: Seat, played: Future, players: Players) -> Future:
    POSITION.set(RunPosition(seat.step, state.user_turns + state.assistant_turns))
    conversation = ScoredConversation(
        task=task,
        messages=tuple(state.messages),
        num_prompt_messages=len(task.prompt),
        policy_tokens=state.policy_tokens,
        sample_index=seat.sample_index,
    )
    try:
        with players.judge_clock:
            scores = await players.scorer.score(conversation)
    except STOPS_ALL:
        raise
    except RunError as error:
        return replace(played, status=RolloutStatus.JUDGE_FAILED, error=str(error))
    return replace(played, scores=scores, reward=players.scorer.reward(scores))
