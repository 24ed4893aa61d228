"""The deployments of one role: which of them gets the next request, cool-downs, and limits per minute.

A request goes to a random one of the deployments that have room and are not cooling down; if all are cooling down, to
the one with the fewest failures since its last answer. A request above the limits per minute waits for its permit.

LiteLLM's Router is not used: in its documented use it sends the requests itself, with its own retries. It refuses a
call above the limits instead of letting it wait, does not cool down a server that refuses connections, and does not see
attempts that our deadline ended.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from collab_megatron.rollout.llm.litellm_api import ApiRequest, Endpoint

CHARS_PER_TOKEN = 4.0  # of a prompt, roughly; corrected when the answer comes
NEWEST_SHARE = 0.1  # weight of the newest answer in the mean length
BURST_S = 5.0  # seconds' worth that may go at once: many providers would refuse a whole minute's worth
NEVER = float("-inf")


class RateLimit:
    """Requests or tokens per minute: a token bucket. Callers pay first and wait afterwards, so nobody is overtaken."""

    def __init__(self, per_minute: float) -> None:
        self._per_s = per_minute / 60.0
        self._burst = max(1.0, self._per_s * BURST_S)
        self._level = self._burst
        self._filled_at = time.monotonic()

    def delay_s(self, amount: float) -> float:
        """Seconds until `amount` may go. More than the burst may go when the bucket is full."""
        self._fill()
        return max(0.0, (min(amount, self._burst) - self._level) / self._per_s)

    def pay(self, amount: float) -> None:
        """Take `amount` out, below zero if need be. A negative amount is given back."""
        self._fill()
        self._level = min(self._burst, self._level - amount)

    def _fill(self) -> None:
        now = time.monotonic()
        self._level = min(self._burst, self._level + (now - self._filled_at) * self._per_s)
        self._filled_at = now


@dataclass(eq=False)
class Deployment:
    """One endpoint with its limits per minute and its recent failures. Times are those of time.monotonic()."""

    index: int
    endpoint: Endpoint
    requests: RateLimit | None
    tokens: RateLimit | None
    mean_completion_tokens: float  # a guess until answers came
    failures: int = 0  # since its last answer
    failed_at: float = NEVER
    cooling_until: float = NEVER  # avoided until then
    closed_until: float = NEVER  # Retry-After: gets no request until then

    def delay_s(self, tokens: float) -> float:
        """Seconds until a request of that many tokens may be sent here."""
        delay_s = self.closed_until - time.monotonic()
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
class Permit:
    """A permit to send one request."""

    deployment: Deployment
    tokens: float  # paid in advance

    def settle(self, prompt_tokens: int, completion_tokens: int, answers: int) -> None:
        """Replace the estimate by the answer's own figures; zeros for a request without an answer."""
        deployment = self.deployment
        if answers:
            deployment.failures = 0
        if deployment.tokens is None:
            return
        deployment.tokens.pay(prompt_tokens + completion_tokens - self.tokens)
        if answers:
            newest = completion_tokens / answers
            deployment.mean_completion_tokens += NEWEST_SHARE * (newest - deployment.mean_completion_tokens)


class NoPermit(Exception):
    """No deployment has room before the call's deadline."""


class Deployments:
    """All deployments of one role."""

    def __init__(self, items: Sequence[Deployment], cooldown_s: float) -> None:
        self.items = tuple(items)
        self.keys = tuple(item.endpoint.key for item in items if item.endpoint.key)
        self._cooldown_s = cooldown_s

    async def permit(self, request: ApiRequest, refused: AbstractSet[int], wait_s: float) -> Permit:
        """A permit for a deployment that is not `refused`. Waits for room.

        Raises NoPermit at once if that would take longer than `wait_s`.
        """
        usable = [item for item in self.items if item.index not in refused]
        tokens = _estimate(request, usable)
        delays_s = [item.delay_s(tokens) for item in usable]
        least_s = min(delays_s)
        if least_s > wait_s:
            raise NoPermit(f"no room within the limits per minute for {least_s:.0f} s")
        ready = [item for item, delay_s in zip(usable, delays_s, strict=True) if delay_s <= 0.0]
        chosen = _choose(ready) if ready else usable[delays_s.index(least_s)]
        chosen.pay(1.0, tokens)
        if not ready:
            try:
                await asyncio.sleep(least_s)
            except asyncio.CancelledError:
                chosen.pay(-1.0, -tokens)
                raise
        return Permit(chosen, tokens)

    def cool_down(self, deployment: Deployment, retry_after_s: float | None) -> bool:
        """Avoid a deployment that failed. False for a single one, which is asked all the same."""
        if len(self.items) == 1:
            return False
        deployment.failures += 1
        deployment.failed_at = now = time.monotonic()
        cooled = now + (self._cooldown_s if retry_after_s is None else retry_after_s)
        deployment.cooling_until = max(deployment.cooling_until, cooled)  # never shorter than closed_until
        if retry_after_s is not None:
            deployment.closed_until = max(deployment.closed_until, now + retry_after_s)
        return True

    def another_healthy(self, deployment: Deployment, refused: AbstractSet[int]) -> bool:
        """Whether another deployment may be asked at once."""
        now = time.monotonic()
        others = (item for item in self.items if item is not deployment and item.index not in refused)
        return any(item.cooling_until <= now for item in others)


def _choose(ready: Sequence[Deployment]) -> Deployment:
    now = time.monotonic()
    healthy = [item for item in ready if item.cooling_until <= now]
    if healthy:
        return random.choice(healthy)
    # one that fails now and then before a dead one; among equals the one whose failure is the oldest
    return min(ready, key=lambda item: (item.failures, item.failed_at))


def _estimate(request: ApiRequest, usable: Sequence[Deployment]) -> float:
    """Tokens of the prompt and of the answers."""
    if all(item.tokens is None for item in usable):
        return 0.0
    prompt = sum(len(message.content) for message in request.asked.messages) / CHARS_PER_TOKEN
    return prompt + request.n * usable[0].mean_completion_tokens
