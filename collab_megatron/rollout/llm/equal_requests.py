"""Answers to equal requests: what was asked at temperature 0, or is being asked, is not asked again.

It keeps the newest answers in memory. An answer from an earlier step is stored in the journal once more, under the
current step: the journal removes the rows of steps that a checkpoint has made obsolete, and a resume must find the
answers of every step that it plays again.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from collab_megatron.rollout.llm.role_journal import RoleJournal
from collab_megatron.run_order import POSITION
from collab_megatron.types import LLMReply

MOST_ANSWERS = 50_000
"""In memory, for one role; about 1 kB each."""


class EqualRequests:
    """The equal requests of one role in one process, by their keys in the journal. For one event loop."""

    def __init__(self, journal: RoleJournal | None, most: int = MOST_ANSWERS) -> None:
        self._journal = journal
        self._most = most
        self._answers: OrderedDict[bytes, tuple[LLMReply, int]] = OrderedDict()  # with the newest step that used it
        self._asked: dict[bytes, asyncio.Event] = {}

    async def answer(self, key: bytes) -> LLMReply | None:
        """The answer to an equal request, free of charge; None: the caller asks.

        Waits for an equal request that is being asked. Unblocked by its answer, or by the end of that call: then all
        that wait ask for themselves, since one caller's deadline must not fail the others.
        """
        if (asked := self._asked.get(key)) is not None:
            await asked.wait()
        found = self._answers.get(key)
        if found is None:
            return None
        self.keep(key, found[0])
        return replace(found[0], prompt_tokens=0, completion_tokens=0, cost_usd=0.0, replayed=False, shared=True)

    @contextmanager
    def asking(self, key: bytes) -> Iterator[None]:
        """A block that asks for the answer; equal requests wait for `keep` or for the end of the block."""
        if key in self._asked:  # another caller asks too, after a failure
            yield
            return
        self._asked[key] = asyncio.Event()
        try:
            yield
        finally:
            self._asked.pop(key).set()

    def keep(self, key: bytes, reply: LLMReply) -> None:
        """An answer came, from the provider or the journal, or is used again."""
        step = POSITION.get().step
        before = self._answers.pop(key, None)
        if self._journal is not None and (reply.replayed if before is None else before[1] < step):
            self._journal.keep_for_step(key, reply)
        self._answers[key] = reply, step if before is None else max(step, before[1])
        if len(self._answers) > self._most:
            self._answers.popitem(last=False)
        if (asked := self._asked.get(key)) is not None:
            asked.set()
