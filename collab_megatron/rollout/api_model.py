"""An API model in the place of the policy, for evaluation.

It gets the chat as messages, not as token ids. Its turns are counted with the tokenizer of model.path, so that all
models of a table have one unit; the ids have no log-probs and no weight versions. The API does not say whether a turn
reached `max_tokens`, so only a turn that ends inside a thought is cut.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from collab_megatron.data.thought_tags import split_thoughts
from collab_megatron.rollout.future import Limits, Players, play_future
from collab_megatron.rollout.group import TreeId
from collab_megatron.rollout.rewards import multiturn_reward
from collab_megatron.run_order import POSITION, RunPosition
from collab_megatron.types import (
    ChatLLM,
    Generation,
    LLMRequest,
    Message,
    PolicyTurn,
    Reply,
    RolloutStatus,
    Task,
)


@dataclass(frozen=True)
class ApiModel:
    """The model and what reads its turns."""

    llm: ChatLLM
    token_ids: Callable[[str], list[int]]  # of a whole turn, its end included
    thought_tags: tuple[str, str]

    async def turn(self, messages: Sequence[Message], sample_index: int) -> PolicyTurn:
        """The turn after `messages`. Waits for one LLM call. Raises SimulatorError."""
        begin_s = time.time()
        request = LLMRequest(list(messages), parse=str, sample_index=sample_index)
        (text,) = await self.llm.complete(request)
        split = split_thoughts(text.strip(), self.thought_tags)
        return PolicyTurn(
            thought=split.thought,
            reply=split.reply,
            sampled=text,
            cut=not split.closed,
            generation=Generation(tuple(self.token_ids(text)), (), (), finish_reason="stop"),
            begin_s=begin_s,
            end_s=time.time(),
        )


class ApiPolicy:
    """Implements conversation.Policy: an API model in one conversation."""

    failure = RolloutStatus.ENGINE_FAILED

    def __init__(self, api: ApiModel, sample_index: int, clock: AbstractContextManager[None]) -> None:
        self._api, self._sample_index, self._clock = api, sample_index, clock

    async def answer(self, messages: Sequence[Message]) -> PolicyTurn:
        """Waits for one LLM call. Raises SimulatorError."""
        with self._clock:
            return await self._api.turn(messages, self._sample_index)


async def play_with_api(task: Task, tree_id: TreeId, api: ApiModel, *, limits: Limits, players: Players) -> Reply:
    """One whole conversation from the prompt on, as group.play_once. Waits for model, user and judges. Raises RunError
    if the first reply does not come."""
    POSITION.set(RunPosition(tree_id.step))
    policy = ApiPolicy(api, tree_id.first_sample, players.engine_clock)
    turn = await policy.answer(task.prompt)
    future = await play_future(
        task,
        players.chat.prompt_ids(task.prompt),
        turn,
        index=0,
        name=f"{tree_id}/0/0",
        sample_index=tree_id.first_sample,
        simulate=True,
        limits=limits,
        players=players,
        policy=policy,
    )
    return Reply(turn=turn, futures_K=(future,), mr=multiturn_reward([future]))
