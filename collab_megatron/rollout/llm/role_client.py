"""The client of one role: the only retry layer, with its deadlines, its concurrency limit and its counters.

A call's deadline covers its requests, the pauses between them and the wait for the limits per minute. It does not cover
the queue of the concurrency limiter: a long queue means that the limit is low, not that the provider is ill. The queue
is finite, since every request in it ends within `deadline_s`. A call in back-off does not count for the limiter.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import random
import time
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from collab_megatron.config.sections import LLMSection
from collab_megatron.limiter import AdaptiveLimiter
from collab_megatron.rollout.llm.accounting import METRIC, RoleUsage, keep_call
from collab_megatron.rollout.llm.budget import note_answer
from collab_megatron.rollout.llm.deployments import Deployment, Deployments, NoPermit
from collab_megatron.rollout.llm.equal_requests import EqualRequests
from collab_megatron.rollout.llm.failure import Failure, SimulatorError, address_of, classify, timed_out
from collab_megatron.rollout.llm.litellm_api import ApiRequest, LiteLLMApi
from collab_megatron.rollout.llm.parsing import MalformedReply, parsed, read_for_record
from collab_megatron.rollout.llm.role_journal import RoleJournal, request_key
from collab_megatron.types import CallRecord, LLMReply, LLMRequest

T = TypeVar("T")

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
WARMER = 0.5
"""Lowest temperature after a malformed reply: at 0 the model would give the same words again."""


class Observer(Protocol):
    """Sees every answer, also those from the journal, for checks that go beyond one call."""

    def provider(self, role: str, model: str, fingerprint: str, deployment: int = 0) -> None:
        """An answer came; model and build as the provider reports them."""

    def malformed(self, role: str, kind: str) -> None:
        """An answer could not be used; `kind` is one of accounting.MALFORMED."""


@dataclass(frozen=True)
class Failed:
    """An attempt without an answer, and its deployment."""

    failure: Failure
    deployment: Deployment


class RoleClient:
    """Implements types.ChatLLM for one LLMSection."""

    def __init__(
        self,
        name: str,
        section: LLMSection,
        deployments: Deployments,
        seed: int,
        api: LiteLLMApi,
        *,
        journal: RoleJournal | None = None,
        observer: Observer | None = None,
        require_room: Callable[[], None] = lambda: None,
        shards: int = 1,
    ) -> None:
        """`require_room` is called before every request that would be paid for; it raises BudgetSpent."""
        self.name = name
        self.section = section
        self.usage = RoleUsage()
        self.limiter = AdaptiveLimiter(max(1, section.max_concurrency // shards))
        self._deployments = deployments
        self._seed = seed
        self._api = api
        self._journal = journal
        self._equal = EqualRequests(journal) if section.answer_once and section.temperature == 0 else None
        self._observer = observer
        self._require_room = require_room
        self._jitter = random.Random(f"{seed}/{name}")

    def counters(self) -> RoleUsage:
        """A copy of the counters, with the current gauges."""
        self.usage.slots, self.usage.waiting = self.limiter.limit, self.limiter.waiting
        return self.usage.copy()

    async def complete(self, request: LLMRequest[T]) -> list[T]:
        """The request's `n` values. With `answer_once` the sample index does not count.

        Waits for an equal request that is being asked, then for the concurrency limiter, then for the provider, at most
        `deadline_s` in all attempts. Raises SimulatorError when attempts or deadline are used up, or at once if another
        attempt cannot help; ReplayMiss if nothing may be sent and the journal has no answer; BudgetSpent if no more may
        be paid for.
        """
        if self._equal is None:
            return await self._complete(request, None)
        with ExitStack() as asking:
            return await self._complete(replace(request, sample_index=0), asking)

    async def _complete(self, request: LLMRequest[T], asking: ExitStack | None) -> list[T]:
        """`asking`: of a call that shares answers; it ends when the call does."""
        section, usage = self.section, self.usage
        failure = Failure("NoAttempt")
        spent_s, attempt, sent, malformed, replayed = 0.0, 0, 0, 0, 0
        values: list[T] = []
        text = ""  # of the first reply that could be used
        replies: list[LLMReply] = []
        begin_s = time.time()
        refused: set[int] = set()  # deployments where another attempt cannot help
        while attempt < section.max_attempts and spent_s < section.deadline_s:
            attempt += 1
            api_request = ApiRequest(
                asked=request,
                section=section,
                n=request.n - len(values),
                seed=request_seed(self._seed, request, malformed + len(values)),
                temperature=max(section.temperature, WARMER) if malformed else section.temperature,
            )
            key = request_key(section.model, api_request)
            result: LLMReply | Failed | None = None
            once = asking if attempt == 1 and not values and not malformed else None
            if once is not None:
                result = await self._shared(key, once)
            if result is None:
                result = self._replay(key)
            if result is None:
                self._require_room()
                usage.calls += sent == 0
                usage.retries += attempt + replayed > 1
                sent += 1
                try:
                    result, seconds = await self._attempt(api_request, key, refused, section.deadline_s - spent_s)
                except NoPermit as error:
                    failure = Failure("RateLimit", detail=str(error))
                    break
                spent_s += seconds
            if isinstance(result, LLMReply):
                replies.append(result)
                if self._equal is not None and not malformed and not values and not result.shared:
                    self._equal.keep(key, result)
                try:
                    values += parsed(result, request.parse)
                except MalformedReply as error:
                    # Another seed may bring other words, and the provider is healthy: ask again without a pause.
                    malformed += 1
                    if result.replayed and self._journal is not None and self._journal.may_ask:
                        attempt -= 1  # else a call that failed once would fail at every resume, without a request
                        replayed += 1
                    self._note_malformed(error.kind)
                    failure = Failure("MalformedReply", detail=str(error))
                    continue
                text = text or result.texts[0]
                if len(values) >= request.n:
                    thought, marks, rest = read_for_record(text) if request.json_reply else ("", {}, text)
                    keep_call(replace(self._call(begin_s, sent, replies), thought=thought, marks=marks, text=rest))
                    return values[: request.n]
                attempt = 0  # a provider without `n` gives one reply per request: go on for the rest
                continue
            failure = result.failure
            if attempt == section.max_attempts:
                break
            pause_s = self._pause_s(result, refused, attempt)
            if pause_s is None or spent_s + pause_s >= section.deadline_s:
                break
            usage.wait_s += pause_s
            spent_s += pause_s
            await asyncio.sleep(pause_s)
        usage.failures += 1
        spent = SimulatorError(
            f"{self.name} ({section.model}) gave no usable reply after {attempt} attempt{'s' * (attempt > 1)} "
            f"in {spent_s:.1f} s{f', and {replayed} from the journal' * (replayed > 0)}; last: {failure}"
        )
        keep_call(replace(self._call(begin_s, sent, replies), error=str(spent)))
        raise spent

    def _call(self, begin_s: float, requests: int, replies: Sequence[LLMReply]) -> CallRecord:
        """The record of a call that ends now."""
        return CallRecord(
            role=self.name,
            model=self.section.model,
            begin_s=begin_s,
            end_s=time.time(),
            metric=METRIC.get(),
            answered_by=replies[-1].model if replies else "",
            requests=requests,
            replayed=bool(replies) and replies[-1].replayed,
            shared=bool(replies) and replies[-1].shared,
            prompt_tokens=sum(reply.prompt_tokens for reply in replies),
            completion_tokens=sum(reply.completion_tokens for reply in replies),
            cost_usd=sum(reply.cost_usd for reply in replies),
        )

    async def _shared(self, key: bytes, asking: ExitStack) -> LLMReply | None:
        """The answer to an equal request; None: this call asks, and equal ones wait for it."""
        assert self._equal is not None
        reply = await self._equal.answer(key)
        if reply is None:
            asking.enter_context(self._equal.asking(key))
            return None
        self.usage.shared += 1
        self._observe(reply)
        return reply

    def _replay(self, key: bytes) -> LLMReply | None:
        """The journal's answer: it needs no permit and costs nothing."""
        if self._journal is None:
            return None
        reply = self._journal.find(key)
        if reply is not None:
            self.usage.replayed += 1
            self._observe(reply)
        return reply

    async def _attempt(
        self, request: ApiRequest, key: bytes, refused: AbstractSet[int], left_s: float
    ) -> tuple[LLMReply | Failed, float]:
        """Send one request: (what came, seconds without the limiter's queue). Raises NoPermit."""
        usage = self.usage
        queued_at = time.monotonic()
        async with self.limiter.take():
            began_at = time.monotonic()
            usage.queue_s += began_at - queued_at
            permit = await self._deployments.permit(request, refused, left_s)
            deployment = permit.deployment
            sent_at = time.monotonic()
            usage.paced_s += sent_at - began_at
            usage.attempts += 1
            usage.in_flight += 1
            timeout_s = min(self.section.timeout_s, left_s - (sent_at - began_at))
            result: LLMReply | Failure
            try:
                # The client's own time-out covers single reads only; this one covers the whole request.
                async with asyncio.timeout(timeout_s):
                    result = await self._api.chat(deployment.endpoint, request, timeout_s)
            except TimeoutError:
                result = timed_out(timeout_s, address_of(deployment.endpoint.section.api_base))
            except asyncio.CancelledError:
                usage.cancelled += 1
                raise
            except Exception as error:  # noqa: BLE001 - LiteLLM raises many kinds; every one becomes a status
                address = address_of(deployment.endpoint.section.api_base)
                result = classify(error, self._deployments.keys, address)
                logger.debug("simulators.%s: attempt failed: %s", self.name, result)
            finally:
                usage.in_flight -= 1
                ended_at = time.monotonic()
                usage.wait_s += ended_at - sent_at
        seconds = ended_at - began_at
        if isinstance(result, Failure):
            permit.settle(0, 0, 0)
            self._note_failure(result, deployment)
            return Failed(result, deployment), seconds
        reply = replace(result, latency_s=ended_at - sent_at, deployment=deployment.index)
        permit.settle(reply.prompt_tokens, reply.completion_tokens, request.n)
        self._note_answer(reply)
        if self._journal is not None:
            self._journal.keep(key, reply)
        return reply, seconds

    def _note_answer(self, reply: LLMReply) -> None:
        usage = self.usage
        usage.answers += 1
        usage.prompt_tokens += reply.prompt_tokens
        usage.completion_tokens += reply.completion_tokens
        usage.cost_usd += reply.cost_usd
        note_answer(reply.cost_usd)
        self.limiter.succeeded(latency_s=reply.latency_s)
        self._observe(reply)

    def _observe(self, reply: LLMReply) -> None:
        """Replayed answers count too: the share of malformed replies is of all that were looked at."""
        if self._observer is not None:
            self._observer.provider(self.name, reply.model, reply.fingerprint, reply.deployment)

    def _note_failure(self, failure: Failure, deployment: Deployment) -> None:
        self.usage.add(failure.counter)
        if failure.overload:
            self.limiter.overloaded()
        if failure.cools_down:
            self.usage.cooldowns += self._deployments.cool_down(deployment, failure.retry_after_s)

    def _note_malformed(self, kind: str) -> None:
        self.usage.add(kind)
        if self._observer is not None:
            self._observer.malformed(self.name, kind)

    def _pause_s(self, failed: Failed, refused: set[int], attempt: int) -> float | None:
        """Seconds until the next attempt, 0 if another deployment is healthy; None if another attempt cannot help."""
        deployments, failure = self._deployments, failed.failure
        if failure.fatal:
            refused.add(failed.deployment.index)
            if len(refused) == len(deployments.items):
                return None
        if failure.fatal or deployments.another_healthy(failed.deployment, refused):
            self.usage.failovers += 1
            return 0.0
        pause_s = min(FIRST_PAUSE_S * 2 ** (attempt - 1), LONGEST_PAUSE_S) * self._jitter.uniform(0.75, 1.25)
        # With several deployments, permits keep all calls away from the one that asked for a pause; no call waits here.
        return max(pause_s, failure.retry_after_s or 0.0) if len(deployments.items) == 1 else pause_s


def request_seed(seed: int, request: LLMRequest[Any], answers: int) -> int:
    """The `seed` parameter in [0, 2**31): a function of run seed, sample and messages, and of the answers so far."""
    messages = [message.as_dict() for message in request.messages]
    key = json.dumps([seed, request.sample_index, answers, messages], ensure_ascii=False)
    return int.from_bytes(hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=4).digest(), "big") >> 1
