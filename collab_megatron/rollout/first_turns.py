"""First user turns of a reply's futures: they answer one and the same chat, so one request can bring all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from collab_megatron.concurrency import cancel_all
from collab_megatron.types import Message, Task, UserSimulator


class UserTurnsTogether(Protocol):
    """A user simulator that writes several next turns of one chat in one request.

    Example: await together.replies(task, chat, sample_indices=(4, 5)) returns ["At noon.", "12 o'clock, please."].
    """

    def request_of(self, sample_index: int) -> int | None:
        """Samples with the same number share a request; None: the sample has a request of its own."""
        ...

    async def replies(self, task: Task, chat: Sequence[Message], *, sample_indices: Sequence[int]) -> list[str]:
        """The next user turn of each sample, all with the same `request_of`. Raises SimulatorError for all of them."""
        ...


class FirstTurns:
    """Implements types.UserSimulator for the futures of one reply. The request belongs to the future that asks first.

    Which futures share a request depends on `sample_indices` alone, never on time: a resume finds it in the journal.
    """

    def __init__(self, user: UserSimulator, together: UserTurnsTogether, sample_indices: Sequence[int]) -> None:
        self._user, self._together = user, together
        by_request: dict[int, list[int]] = {}
        for index in sample_indices:
            if (request := together.request_of(index)) is not None:
                by_request.setdefault(request, []).append(index)
        # by sample; a sample leaves with its first turn
        self._shared = {index: tuple(some) for some in by_request.values() if len(some) > 1 for index in some}
        self._asked: dict[tuple[int, ...], asyncio.Task[list[str]]] = {}

    async def reply(self, task: Task, chat: Sequence[Message], *, sample_index: int) -> str:
        """Waits for the request that brings the turn. Raises SimulatorError, for every future of a failed request."""
        some = self._shared.pop(sample_index, None)
        if some is None:
            return await self._user.reply(task, chat, sample_index=sample_index)
        if some not in self._asked:
            replies = self._together.replies(task, tuple(chat), sample_indices=some)
            self._asked[some] = asyncio.create_task(replies)
        texts = await asyncio.shield(self._asked[some])  # one future's deadline does not end the others' request
        return texts[some.index(sample_index)]

    async def close(self) -> None:
        """Cancel requests that no future waits for any more. Waits until they have ended."""
        await cancel_all(self._asked.values())
