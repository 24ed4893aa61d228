"""The ways to one role's model: which is asked next, which is left alone for a while, and how fast each may be asked.

LiteLLM's Router chooses among those that are well and keeps the cool-downs; what is to be cooled down it is told. Its
own judgement never cools a server that refuses connections, does not see attempts that our deadline ended, and refuses
a call above the limits per minute where ours waits. A role with one deployment needs no Router.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

from collab_megatron.rollout.llm.litellm_api import Endpoint, Request
from collab_megatron.rollout.llm.pacing import Bucket

CHARS_PER_TOKEN = 4.0  # of a prompt, roughly: what was wrong about it is settled when the answer comes
NEWS = 0.1  # weight of the newest answer in the mean length


@dataclass(eq=False)
class Deployment:
    """One endpoint with its limits per minute and its bad moments."""

    index: int
    endpoint: Endpoint
    requests: Bucket | None
    tokens: Bucket | None
    mean_completion_tokens: float  # a guess until answers came
    failed_at: float = float("-inf")
    failures: int = 0  # since it last answered
    asked_until: float = field(default=float("-inf"))  # Retry-After: nobody asks before

    def delay_s(self, tokens: float) -> float:
        """Seconds until a call of so many tokens may go here."""
        delay_s = self.asked_until - time.monotonic()
        if self.requests is not None:
            delay_s = max(delay_s, self.requests.delay_s(1.0))
        if self.tokens is not None:
            delay_s = max(delay_s, self.tokens.delay_s(tokens))
        return max(0.0, delay_s)

    def pay(self, requests: float, tokens: float) -> None:
        if self.requests is not None:
            self.requests.pay(requests)
        if self.tokens is not None:
            self.tokens.pay(tokens)


@dataclass(frozen=True)
class Turn:
    """The right to send one request."""

    deployment: Deployment
    tokens: float  # paid in advance

    def settle(self, prompt_tokens: int, completion_tokens: int, answers: int) -> None:
        """The answer's own figures in place of the estimate; zeros for a request that brought none."""
        where = self.deployment
        if answers:
            where.failures = 0
        if where.tokens is None:
            return
        where.tokens.pay(prompt_tokens + completion_tokens - self.tokens)
        if answers:
            where.mean_completion_tokens += NEWS * (completion_tokens / answers - where.mean_completion_tokens)


class NoTurn(Exception):
    """None has room within the time that is left."""


class Deployments:
    """Those of one role. `router` is LiteLLM's, None for a single one."""

    def __init__(self, group: str, items: Sequence[Deployment], cooldown_s: float, router: Any) -> None:
        self.items = tuple(items)
        self.keys = tuple(item.endpoint.key for item in items if item.endpoint.key)
        self._group = group
        self._cooldown_s = cooldown_s
        self._router = router
        self._ids = [str(item.index) for item in self.items]

    async def turn(self, request: Request, refused: AbstractSet[int], wait_s: float) -> Turn:
        """The right to ask a deployment that is not `refused`; waits for room. Raises NoTurn after, at most, wait_s."""
        usable = [item for item in self.items if item.index not in refused]
        tokens = _estimate(request, usable)
        delays_s = [item.delay_s(tokens) for item in usable]
        least_s = min(delays_s)
        if least_s > wait_s:
            raise NoTurn(f"no room within the limits per minute for {least_s:.0f} s")
        ready = [item for item, delay_s in zip(usable, delays_s, strict=True) if delay_s <= 0.0]
        chosen = await self._choose(ready) if ready else usable[delays_s.index(least_s)]
        chosen.pay(1.0, tokens)
        if not ready:
            try:
                await asyncio.sleep(least_s)
            except asyncio.CancelledError:
                chosen.pay(-1.0, -tokens)
                raise
        return Turn(chosen, tokens)

    def cool(self, deployment: Deployment, kind: str, asked_s: float | None) -> bool:
        """Leave it alone for a while; whether there is another to ask meanwhile, so that this makes a difference."""
        if self._router is None:
            return False
        now = time.monotonic()
        deployment.failed_at = now
        deployment.failures += 1
        if asked_s is not None:
            deployment.asked_until = max(deployment.asked_until, now + asked_s)
        self._router.cooldown_cache.add_deployment_to_cooldown(
            model_id=str(deployment.index),
            original_exception=RuntimeError(kind),  # the Router keeps its text: the provider's own may quote a key
            exception_status=500,
            cooldown_time=self._cooldown_s if asked_s is None else asked_s,
        )
        return True

    def another_well(self, deployment: Deployment, refused: AbstractSet[int]) -> bool:
        """Whether one beside it may be asked at once."""
        if self._router is None:
            return False
        cooling = {name for name, _ in self._router.cooldown_cache.get_active_cooldowns(self._ids, None)}
        return any(
            item is not deployment and item.index not in refused and str(item.index) not in cooling
            for item in self.items
        )

    async def _choose(self, ready: Sequence[Deployment]) -> Deployment:
        if self._router is None or len(ready) == 1:
            return ready[0]
        excluded = [str(item.index) for item in self.items if item not in ready]
        try:
            found = await self._router.async_get_available_deployment(
                model=self._group, request_kwargs={"_excluded_deployment_ids": excluded}
            )
        except ValueError:  # its RouterRateLimitError: all are cooling down
            # one that fails now and then before one that is dead; of equals the one that had the longest rest
            return min(ready, key=lambda item: (item.failures, item.failed_at))
        return self.items[int(found["model_info"]["id"])]


def _estimate(request: Request, usable: Sequence[Deployment]) -> float:
    if all(item.tokens is None for item in usable):
        return 0.0
    prompt = sum(len(message["content"]) for message in request.messages) / CHARS_PER_TOKEN
    return prompt + request.n * usable[0].mean_completion_tokens
