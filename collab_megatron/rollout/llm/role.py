"""One role of the gateway: the only retry layer, its deadlines, its concurrency bound and its counters.

A call's deadline covers its requests, the pauses between them and the wait for room within the limits per minute, not
the queue for a free slot: a long queue says that the bound is low, not that the provider is ill. The queue is finite,
since every holder of a slot leaves within `deadline_s`. The slot is given back during back-off.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from collab_megatron.config.sections import LLMSection
from collab_megatron.limiter import Slots
from collab_megatron.rollout.journal.calls import METRIC, keep_call
from collab_megatron.rollout.llm.answer import Answer, Observer, find_problem, share_out
from collab_megatron.rollout.llm.budget import note_answer
from collab_megatron.rollout.llm.deployments import Deployment, Deployments, NoTurn
from collab_megatron.rollout.llm.failure import Failure, SimulatorError, address_of, classify, timed_out
from collab_megatron.rollout.llm.litellm_api import ApiReply, LiteLLMApi, Request
from collab_megatron.rollout.llm.parsing import read_for_record
from collab_megatron.rollout.llm.recorded import Recorded
from collab_megatron.rollout.llm.usage import RoleUsage
from collab_megatron.types import CallRecord, LLMReply, Message

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
WARMER = 0.5
"""Least temperature once a reply could not be used: a greedy judge would give the same words again."""


@dataclass(frozen=True)
class Failed:
    """An attempt that brought nothing, and where."""

    failure: Failure
    deployment: Deployment


class Role:
    """Implements types.ChatLLM for one LLMSection."""

    def __init__(
        self,
        name: str,
        section: LLMSection,
        deployments: Deployments,
        seed: int,
        api: LiteLLMApi,
        *,
        recorded: Recorded | None = None,
        observer: Observer | None = None,
        require_room: Callable[[], None] = lambda: None,
        shards: int = 1,
    ) -> None:
        """`require_room` is asked before every request that would be paid for; it raises BudgetSpent."""
        self.name = name
        self.section = section
        self.usage = RoleUsage()
        self.slots = Slots(max(1, section.max_concurrency // shards))
        self._deployments = deployments
        self._seed = seed
        self._api = api
        self._recorded = recorded
        self._observer = observer
        self._require_room = require_room
        self._jitter = random.Random(f"{seed}/{name}")

    def counters(self) -> RoleUsage:
        """A copy of the counters, with the gauges as they stand."""
        self.usage.slots, self.usage.waiting = self.slots.limit, self.slots.waiting
        return self.usage.copy()

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
        attempts or the deadline are spent, or at once when asking again cannot help; ReplayMiss where nothing may be
        asked and the journal lacks the answer, BudgetSpent where no more may be paid for.
        """
        section, usage = self.section, self.usage
        wire = [message.as_dict() for message in messages]
        failure = Failure("NoAttempt", None, False, None)
        spent_s, attempt, sent, malformed, replayed = 0.0, 0, 0, 0, 0
        replies: list[LLMReply] = []
        answers: list[Answer] = []
        begin_s = time.time()
        refused: set[int] = set()  # deployments where asking this again cannot help
        while attempt < section.max_attempts and spent_s < section.deadline_s:
            attempt += 1
            seed = request_seed(self._seed, sample_index, wire, malformed + len(replies))
            temperature = max(section.temperature, WARMER) if malformed else section.temperature
            request = self._request(wire, n - len(replies), seed, temperature, json_reply, schema)
            key = None if self._recorded is None else self._recorded.key(request, sample_index)
            result: Answer | Failed | None = self._replay(key)
            if result is None:
                self._require_room()
                usage.calls += sent == 0
                usage.retries += attempt + replayed > 1
                sent += 1
                try:
                    result, seconds = await self._attempt(request, key, refused, section.deadline_s - spent_s)
                except NoTurn as error:
                    failure = Failure("NoTurn", None, False, None, str(error))
                    break
                spent_s += seconds
            if isinstance(result, Answer):
                answers.append(result)
                problem = find_problem(result.reply, check)
                if problem is None:
                    replies += share_out(result)
                    if len(replies) >= n:
                        keep_call(self._call(begin_s, sent, answers, text=replies[0].text, json_reply=json_reply))
                        return replies[:n]
                    attempt = 0  # a provider without `n` gives one reply a request: go on for the rest
                    continue
                # Other words may come of another seed, and the provider is well: ask again without a pause.
                malformed += 1
                if result.replayed and self._recorded is not None and self._recorded.may_ask:
                    attempt -= 1  # else a call that failed once would fail at every resume, without a request
                    replayed += 1
                self._note_malformed(problem[0])
                failure = Failure("MalformedReply", None, False, None, problem[1])
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
            f"in {spent_s:.1f} s{f', and {replayed} of the journal' * (replayed > 0)}; last: {failure}",
            fatal=failure.fatal,
        )
        keep_call(self._call(begin_s, sent, answers, error=str(spent)))
        raise spent

    def _call(
        self,
        begin_s: float,
        requests: int,
        answers: Sequence[Answer],
        *,
        text: str = "",
        json_reply: bool = False,
        error: str = "",
    ) -> CallRecord:
        """What is recorded of a call that ends now."""
        thought, marks, rest = read_for_record(text) if json_reply else ("", {}, text)
        return CallRecord(
            role=self.name,
            model=self.section.model,
            begin_s=begin_s,
            end_s=time.time(),
            metric=METRIC.get(),
            answered_by=answers[-1].reply.model if answers else "",
            requests=requests,
            replayed=bool(answers) and answers[-1].replayed,
            prompt_tokens=sum(answer.reply.prompt_tokens for answer in answers),
            completion_tokens=sum(answer.reply.completion_tokens for answer in answers),
            cost_usd=sum(answer.reply.cost_usd for answer in answers),
            thought=thought,
            marks=marks,
            text=rest,
            error=error,
        )

    def _request(
        self,
        wire: Sequence[Mapping[str, str]],
        n: int,
        seed: int,
        temperature: float,
        json_reply: bool,
        schema: Mapping[str, Any] | None,
    ) -> Request:
        section = self.section
        wanted = schema if json_reply and section.json_schema else None
        return Request(wire, temperature, section.max_tokens, n, seed, json_reply, wanted, section.extra)

    def _replay(self, key: bytes | None) -> Answer | None:
        """What the journal has: it takes no slot and costs nothing."""
        if self._recorded is None or key is None:
            return None
        found = self._recorded.look_up(key)
        if found is None:
            return None
        reply, latency_s, deployment = found
        self.usage.replayed += 1
        self._observe(reply, deployment)
        return Answer(reply, latency_s, replayed=True)

    async def _attempt(
        self, request: Request, key: bytes | None, refused: AbstractSet[int], left_s: float
    ) -> tuple[Answer | Failed, float]:
        """One request in a slot of its own; (what came, seconds without the queue). Raises NoTurn."""
        usage = self.usage
        queued_at = time.monotonic()
        async with self.slots.take():
            began_at = time.monotonic()
            usage.queue_s += began_at - queued_at
            turn = await self._deployments.turn(request, refused, left_s)
            sent_at = time.monotonic()
            usage.paced_s += sent_at - began_at
            usage.attempts += 1
            usage.in_flight += 1
            timeout_s = min(self.section.timeout_s, left_s - (sent_at - began_at))
            result: ApiReply | Failure
            try:
                # The client's own time-out covers single reads only; this one covers the whole request.
                async with asyncio.timeout(timeout_s):
                    result = await self._api.chat(turn.deployment.endpoint, request, timeout_s)
            except TimeoutError:
                result = timed_out(timeout_s, address_of(turn.deployment.endpoint.api_base))
            except asyncio.CancelledError:
                usage.cancelled += 1
                raise
            except Exception as error:  # noqa: BLE001 - LiteLLM raises many kinds; every one becomes a status
                address = address_of(turn.deployment.endpoint.api_base)
                result = classify(error, self._deployments.keys, address)
                logger.debug("simulators.%s: attempt failed: %s", self.name, result)
            finally:
                usage.in_flight -= 1
                ended_at = time.monotonic()
                usage.wait_s += ended_at - sent_at
        seconds, latency_s = ended_at - began_at, ended_at - sent_at
        if isinstance(result, Failure):
            turn.settle(0, 0, 0)
            self._note_failure(result, turn.deployment)
            return Failed(result, turn.deployment), seconds
        turn.settle(result.prompt_tokens, result.completion_tokens, request.n)
        self._note_answer(result, latency_s, turn.deployment.index)
        if self._recorded is not None and key is not None:
            self._recorded.keep(key, result, latency_s, turn.deployment.index)
        return Answer(result, latency_s), seconds

    def _note_answer(self, reply: ApiReply, latency_s: float, deployment: int) -> None:
        usage = self.usage
        usage.answers += 1
        usage.prompt_tokens += reply.prompt_tokens
        usage.completion_tokens += reply.completion_tokens
        usage.cost_usd += reply.cost_usd
        note_answer(reply.cost_usd)
        self.slots.succeeded(latency_s=latency_s)
        self._observe(reply, deployment)

    def _observe(self, reply: ApiReply, deployment: int) -> None:
        """What the journal gives counts like what comes: a share of malformed replies is of all that were looked at."""
        if self._observer is not None:
            self._observer.provider(self.name, reply.model, reply.fingerprint, deployment)

    def _note_failure(self, failure: Failure, deployment: Deployment) -> None:
        self.usage.add(failure.counter)
        if failure.overload:
            self.slots.overloaded()
        if failure.ill:
            self.usage.cooldowns += self._deployments.cool(deployment, failure.kind, failure.retry_after_s)

    def _note_malformed(self, kind: str) -> None:
        self.usage.add(kind)
        if self._observer is not None:
            self._observer.malformed(self.name, kind)

    def _pause_s(self, failed: Failed, refused: set[int], attempt: int) -> float | None:
        """Seconds until the next attempt, none where another deployment is well; None: asking again cannot help."""
        deployments, failure = self._deployments, failed.failure
        if failure.fatal:
            refused.add(failed.deployment.index)
            if len(refused) == len(deployments.items):
                return None
        if failure.fatal or deployments.another_well(failed.deployment, refused):
            self.usage.failovers += 1
            return 0.0
        pause_s = min(FIRST_PAUSE_S * 2 ** (attempt - 1), LONGEST_PAUSE_S) * self._jitter.uniform(0.75, 1.25)
        # With several deployments the one that asked for a pause gets it from all calls, and no call waits here for it.
        return max(pause_s, failure.retry_after_s or 0.0) if len(deployments.items) == 1 else pause_s


def request_seed(seed: int, sample_index: int, wire: Sequence[Mapping[str, str]], answers: int) -> int:
    """The `seed` parameter in [0, 2**31): a function of run seed, sample and content, and of how many answers came."""
    key = json.dumps([seed, sample_index, answers, list(wire)], ensure_ascii=False)
    return int.from_bytes(hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=4).digest(), "big") >> 1
