"""Conversation player: a user and a policy take turns until the user ends the chat or a limit is reached.

The driver plays the policy in training (future.py), the data engine plays an LLM (data_engine/grow.py). A reply whose
score is wanted opens the conversation. Everybody but the policy sees its replies only, never its thoughts.

A failed call raises. Then `Conversation.waiting_for` is the status of a future that lost this call, and the messages so
far are in place for the record.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from collab_megatron.config.sections.rollout import CutReply
from collab_megatron.run_order import POSITION, RunPosition
from collab_megatron.types import (
    TERMINATION_SIGNAL,
    Future,
    Message,
    RolloutStatus,
    ScoredConversation,
    Task,
    UserSimulator,
)

UNTIMED = nullcontext()


class PlayedTurn(Protocol):
    """One turn of a policy; types.PolicyTurn is one."""

    @property
    def reply(self) -> str: ...  # what user and judges see
    @property
    def cut(self) -> bool: ...  # it reached its token limit, or ended inside a thought
    @property
    def broken(self) -> bool: ...  # cut or empty: a user has nothing whole to answer
    @property
    def num_tokens(self) -> int: ...  # thoughts included


T = TypeVar("T", bound=PlayedTurn)
T_co = TypeVar("T_co", bound=PlayedTurn, covariant=True)


class Policy(Protocol[T_co]):
    """The assistant of one conversation. It may keep a context of its own."""

    @property
    def failure(self) -> RolloutStatus: ...  # of a future whose policy did not answer

    async def answer(self, messages: Sequence[Message]) -> T_co | None:
        """The turn after `messages`, which end with the user's; None where the context has no room for one.

        Raises RunError without an answer.
        """
        ...


class ConversationScorer(Protocol):
    """All metrics of one conversation (rewards/scorer.py)."""

    async def score(self, conversation: ScoredConversation) -> dict[str, float]: ...
    def reward(self, scores: dict[str, float]) -> float: ...


@dataclass(frozen=True, kw_only=True)
class TurnLimits:
    """Where a conversation ends."""

    max_user_turns: int  # after the opening reply
    max_assistant_turns: int  # the opening reply included
    cut_reply: CutReply = "score"  # what happens to a conversation with a broken policy turn
    termination_signal: str = TERMINATION_SIGNAL  # a user turn with this text is the last

    def breaks_off(self, turn: PlayedTurn) -> bool:
        """Whether the conversation ends with `turn`, because no user could answer it."""
        return turn.broken and self.cut_reply != "play"


class Conversation(Generic[T]):
    """One conversation: a prompt, the reply whose score is wanted, and the turns after it."""

    def __init__(self, task: Task, prompt: Sequence[Message], reply: T, *, sample_index: int) -> None:
        """`sample_index` tells apart the calls to user and judges of conversations with the same messages."""
        self._task, self._sample_index = task, sample_index
        self._num_prompt_messages = len(prompt)
        self._user_turns = 0
        self.messages = [*prompt, Message("assistant", reply.reply)]
        self.turns = [reply]  # of the policy
        self.waiting_for = RolloutStatus.SIMULATOR_FAILED  # status of a future that lost the current call

    async def play(
        self,
        user: UserSimulator,
        policy: Policy[T],
        limits: TurnLimits,
        *,
        user_clock: AbstractContextManager[None] = UNTIMED,
    ) -> RolloutStatus:
        """Play to the end. A policy turn without room in the context, or cut, ends with TRUNCATED.

        Waits for user and policy in turn; their clients have the deadlines. Raises what they raise.
        """
        while self._user_turns < limits.max_user_turns and len(self.turns) < limits.max_assistant_turns:
            if limits.breaks_off(self.turns[-1]):
                return RolloutStatus.TRUNCATED
            self._wait_for(RolloutStatus.SIMULATOR_FAILED)
            with user_clock:
                text = await user.reply(self._task, self.messages, sample_index=self._sample_index)
            self.messages.append(Message("user", text))
            self._user_turns += 1
            if limits.termination_signal in text:
                return RolloutStatus.TERMINATED
            self._wait_for(policy.failure)
            turn = await policy.answer(self.messages)
            if turn is None:
                return RolloutStatus.TRUNCATED
            self.messages.append(Message("assistant", turn.reply))
            self.turns.append(turn)
        return self.standing(limits)

    def standing(self, limits: TurnLimits) -> RolloutStatus:
        """The status of a conversation that ends with the current turn."""
        cut = self.turns[-1].cut or limits.breaks_off(self.turns[-1])
        return RolloutStatus.TRUNCATED if cut else RolloutStatus.MAX_TURNS

    async def score(self, scorer: ConversationScorer) -> dict[str, float]:
        """The score of every metric. Waits for the judges. Raises what the scorer raises."""
        self._wait_for(RolloutStatus.JUDGE_FAILED)
        return await scorer.score(self.finished())

    def finished(self) -> ScoredConversation:
        """The conversation so far, for its judges."""
        return ScoredConversation(
            task=self._task,
            messages=tuple(self.messages),
            num_prompt_messages=self._num_prompt_messages,
            policy_tokens=self._policy_tokens,
            sample_index=self._sample_index,
        )

    def future(self, index: int, status: RolloutStatus, error: str = "") -> Future:
        """The conversation so far as future `index` of its opening reply, without scores."""
        later = tuple(self.messages[self._num_prompt_messages + 1 :])
        return Future(index, status, later, policy_tokens=self._policy_tokens, error=error)

    @property
    def _policy_tokens(self) -> int:
        return sum(turn.num_tokens for turn in self.turns)

    def _wait_for(self, failure: RolloutStatus) -> None:
        """Note whose call comes next, and its place in the queues: the fewer turns, the earlier."""
        self.waiting_for = failure
        POSITION.set(RunPosition(POSITION.get().step, self._user_turns + len(self.turns)))
