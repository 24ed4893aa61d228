"""One role of the gateway: the only retry layer, its deadlines, its concurrency bound and its counters.

A call's deadline covers its requests and the pauses between them, not the queue for a free slot: a long queue says that
the bound is low, not that the provider is ill. The queue is finite, since every holder of a slot leaves within
`timeout_s`. The slot is given back during back-off.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from collab_megatron.config.sections import LLMSection
from collab_megatron.simulators.failure import Failure, SimulatorError, classify
from collab_megatron.simulators.litellm_api import ApiReply, LiteLLMApi
from collab_megatron.simulators.usage import RoleUsage
from collab_megatron.types import LLMReply, Message

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0


class Role:
    """Implements types.ChatLLM for one LLMSection."""

    def __init__(self, name: str, section: LLMSection, key: str | None, seed: int, api: LiteLLMApi) -> None:
        self.name = name
        self.section = section
        self.usage = RoleUsage()
        self._key = key
        self._seed = seed
        self._api = api
        self._slots = asyncio.Semaphore(section.max_concurrency)
        self._jitter = random.Random(f"{seed}/{name}")

    async def complete(
        self,
        messages: Sequence[Message],
        *,
        sample_index: int = 0,
        n: int = 1,
        json_reply: bool = False,
        schema: Mapping[str, Any] | None = None,
        check: Callable[[str], object] | None = None,
    ) -> list[LLMReply]:
        """n replies that pass `check` (which raises ValueError for one that does not) and are not empty.

        Waits for a slot, then for the provider, at most `deadline_s` in all attempts. Raises SimulatorError when the
        attempts or the deadline are spent, or at once when asking again cannot help.
        """
        section, usage = self.section, self.usage
        wire = [{"role": message.role, "content": message.content} for message in messages]
        usage.calls += 1
        failure = Failure("NoAttempt", None, False, None)
        spent_s, malformed, attempt = 0.0, 0, 0
        replies: list[LLMReply] = []
        while attempt < section.max_attempts and spent_s < section.deadline_s:
            attempt += 1
            usage.retries += attempt > 1
            timeout_s = min(section.timeout_s, section.deadline_s - spent_s)
            seed = request_seed(self._seed, sample_index, wire, malformed + len(replies))
            result, latency_s = await self._attempt(wire, n - len(replies), seed, json_reply, timeout_s)
            spent_s += latency_s
            if isinstance(result, ApiReply):
                problem = find_problem(result.texts, check)
                if problem is None:
                    replies += share_out(result, latency_s)
                    if len(replies) >= n:
                        return replies[:n]
                    attempt = 0  # a provider without `n` gives one reply a request: go on for the rest
                    continue
                # Other words may come of another seed, and the provider is well: ask again without a pause.
                malformed += 1
                usage.malformed += 1
                failure = Failure("MalformedReply", None, False, None, problem)
                continue
            failure = result
            if failure.fatal or attempt == section.max_attempts:
                break
            pause_s = self._pause_s(attempt, failure.retry_after_s)
            if spent_s + pause_s >= section.deadline_s:
                break
            usage.wait_s += pause_s
            spent_s += pause_s
            await asyncio.sleep(pause_s)
        usage.failures += 1
        raise SimulatorError(
            f"{self.name} ({section.model}) gave no usable reply after {attempt} attempt{'s' * (attempt > 1)} "
            f"in {spent_s:.1f} s; last: {failure}",
            fatal=failure.fatal,
        )

    async def _attempt(
        self, wire: Sequence[Mapping[str, str]], n: int, seed: int, json_reply: bool, timeout_s: float
    ) -> tuple[ApiReply | Failure, float]:
        """One request in a slot of its own; (reply or failure, seconds without the queue)."""
        queued_at = time.monotonic()
        async with self._slots:
            started_at = time.monotonic()
            self.usage.queue_s += started_at - queued_at
            self.usage.attempts += 1
            self.usage.in_flight += 1
            result: ApiReply | Failure
            try:
                # The client's own time-out covers single reads only; this one covers the whole request.
                async with asyncio.timeout(timeout_s):
                    reply = await self._api.chat(
                        self.section, self._key, wire, n=n, seed=seed, json_reply=json_reply, timeout_s=timeout_s
                    )
                self.usage.prompt_tokens += reply.prompt_tokens
                self.usage.completion_tokens += reply.completion_tokens
                self.usage.cost_usd += reply.cost_usd
                result = reply
            except TimeoutError:
                result = Failure("Timeout", None, False, None, f"no answer within {timeout_s:.1f} s")
            except Exception as error:  # noqa: BLE001 - LiteLLM raises many kinds; every one becomes a status
                result = classify(error, self._key)
                logger.debug("simulators.%s: attempt failed: %s", self.name, result)
            finally:
                self.usage.in_flight -= 1
                latency_s = time.monotonic() - started_at
                self.usage.wait_s += latency_s
        return result, latency_s

    def _pause_s(self, attempt: int, retry_after_s: float | None) -> float:
        pause_s = min(FIRST_PAUSE_S * 2 ** (attempt - 1), LONGEST_PAUSE_S) * self._jitter.uniform(0.75, 1.25)
        return max(pause_s, retry_after_s or 0.0)


def request_seed(seed: int, sample_index: int, wire: Sequence[Mapping[str, str]], answers: int) -> int:
    """The `seed` parameter in [0, 2**31): a function of run seed, sample and content, and of how many answers came."""
    key = json.dumps([seed, sample_index, answers, list(wire)], ensure_ascii=False)
    return int.from_bytes(hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=4).digest(), "big") >> 1


def find_problem(texts: Sequence[str], check: Callable[[str], object] | None) -> str | None:
    """Why these replies cannot be used; None if they can."""
    if not texts:
        return "no reply came"
    for text in texts:
        if not text.strip():
            return "the reply is empty"
        if check is not None:
            try:
                check(text)
            except ValueError as error:
                return str(error)
    return None


def share_out(reply: ApiReply, latency_s: float) -> list[LLMReply]:
    """One LLMReply for each choice. The request's tokens and dollars stand on the first, so that sums stay right."""
    first = LLMReply(reply.texts[0], reply.cost_usd, reply.prompt_tokens, reply.completion_tokens, latency_s)
    return [first, *(LLMReply(text, latency_s=latency_s) for text in reply.texts[1:])]
