"""Policy engine with a journal and a token limit: turns in the journal are not sampled again."""

from __future__ import annotations

import asyncio
import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import replace

from collab_megatron.limiter import AdaptiveLimiter
from collab_megatron.rollout.journal.store import Journal
from collab_megatron.types import Generation, PolicyEngine

SMOOTHING = 0.05
"""Weight of the newest turn in the moving average of turn lengths."""

ANY_VERSION = 2**62
"""Above the weight versions of any trainer, and of servers without a trainer."""


class JournaledEngine:
    """Implements types.PolicyEngine. `limiter` limits the tokens of the calls in flight.

    `max_staleness` None: no trainer publishes weight versions, and every turn of the journal's lineage is usable."""

    def __init__(
        self, engine: PolicyEngine, journal: Journal | None, limiter: AdaptiveLimiter, *, max_staleness: int | None
    ) -> None:
        self._engine, self._journal, self._limiter = engine, journal, limiter
        self._max_staleness = max_staleness
        self._new_tokens: float | None = None  # moving average of turn lengths
        self._version: int | None = 0
        self._horizon = 0
        self._moved = asyncio.Condition()
        self.replayed = 0  # turns from the journal

    @property
    def ages(self) -> bool:
        """Whether turns get older with the steps of a trainer."""
        return self._max_staleness is not None and self._version is not None

    async def trainer_at(self, version: int | None, horizon: int) -> None:
        """Weights `version` are live (None: nobody trains). An earlier attempt reached version `horizon`: the journal
        has turns of versions in between, usable once their version is live. Unblocks `generate`."""
        async with self._moved:
            self._version, self._horizon = version, horizon if version is None else max(version, horizon)
            self._moved.notify_all()

    async def generate(
        self,
        input_ids: Sequence[int],
        *,
        n: int,
        temperature: float,
        max_new_tokens: int,
        affinity: str = "",
        name: str = "",
    ) -> list[Generation]:
        """Turns from the journal, or from the engine and then written to the journal. `name` is unique in the run.

        A turn from the journal waits for its weight version, unblocked by `trainer_at`. Else waits for room in the
        token limit and for the engine. Raises what the engine raises, and ReplayMiss.
        """
        key = turn_key(name, input_ids, n=n, temperature=temperature, max_new_tokens=max_new_tokens)
        recorded = self._recorded(key)
        if recorded is not None and self.ages:
            newest = max((version for generation in recorded for version in generation.versions_T), default=0)
            async with self._moved:
                await self._moved.wait_for(lambda: self._version is None or newest <= self._version)
        if recorded is not None:
            self.replayed += len(recorded)
            return [replace(generation, replayed=True) for generation in recorded]
        expected = max_new_tokens if self._new_tokens is None else min(max_new_tokens, 1.25 * self._new_tokens)
        amount = len(input_ids) + n * expected
        async with self._limiter.take(amount):
            generations = await self._engine.generate(
                input_ids, n=n, temperature=temperature, max_new_tokens=max_new_tokens, affinity=affinity, name=name
            )
        self._limiter.succeeded(amount)
        for generation in generations:
            length = len(generation.token_ids_T)
            mean = length if self._new_tokens is None else self._new_tokens
            self._new_tokens = mean + SMOOTHING * (length - mean)
        if self._journal is not None:
            self._journal.record_turn(key, generations)
        return generations

    def _recorded(self, key: bytes) -> tuple[Generation, ...] | None:
        if self._journal is None:
            return None
        if self._max_staleness is None or self._version is None:
            return self._journal.turn(key, oldest=-ANY_VERSION, newest=ANY_VERSION)
        return self._journal.turn(key, oldest=max(0, self._version - self._max_staleness), newest=self._horizon)


def turn_key(name: str, input_ids: Sequence[int], *, n: int, temperature: float, max_new_tokens: int) -> bytes:
    """16 bytes that identify a turn of the run and the context that it is sampled from."""
    head = f"{name}|{n}|{temperature!r}|{max_new_tokens}|".encode()
    return hashlib.blake2b(head + array("q", input_ids).tobytes(), digest_size=16).digest()
