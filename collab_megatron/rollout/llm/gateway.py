"""The LLM gateway: the client of each role, with its keys, addresses and counters.

    roles = llm_roles(config.simulators, config.reward)
    gateway = Gateway(roles, config.run.seed, journal=journal, budget=config.budget)
    await gateway.check_reachable(timeout_s=5)
    replies = await gateway.role("user").complete(LLMRequest([Message("user", "hello")], parse=str))
    await gateway.close()

It can be made anywhere, and is used within one event loop. If several models play a role (a mixture), each has counters
of its own: `user`, `user-1`, ... A metric's own judge is the role `judge-METRIC`.
"""

from __future__ import annotations

import asyncio
import bisect
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

from collab_megatron.config.roles import role_place
from collab_megatron.config.sections import BudgetSection, DeploymentSection, LLMSection, SimulatorSection, UserSection
from collab_megatron.config.sections.addresses import host_and_port
from collab_megatron.errors import UserError
from collab_megatron.rollout.journal.store import Journal
from collab_megatron.rollout.llm.accounting import GatewaySnapshot
from collab_megatron.rollout.llm.budget import Budget, Costs
from collab_megatron.rollout.llm.deployments import Deployment, Deployments, RateLimit
from collab_megatron.rollout.llm.failure import address_of, why_not_connected
from collab_megatron.rollout.llm.litellm_api import Endpoint, LiteLLMApi
from collab_megatron.rollout.llm.prices import price, require_prices
from collab_megatron.rollout.llm.role_client import Observer, RoleClient
from collab_megatron.rollout.llm.role_journal import RoleJournal
from collab_megatron.types import ChatLLM, LLMRequest

T = TypeVar("T")


class Gateway:
    """All LLM roles of a run.

    Raises UserError if the environment variable of a key is not set, or if the budget has a cap in dollars and a model
    has no known price.
    """

    def __init__(
        self,
        roles: Mapping[str, LLMSection],
        seed: int,
        *,
        observer: Observer | None = None,
        journal: Journal | None = None,
        budget: BudgetSection | None = None,
        shards: int = 1,
        go_on: str = "set run.resume=true",
    ) -> None:
        """`shards`: processes that have a gateway each; they share all limits of the config. `go_on`: how a run goes on
        after its budget was spent, for the error message."""
        self._parts = {name: _parts(name, section) for name, section in roles.items()}
        for place, deployment in self._deployments():
            _read_key(place, deployment)  # before anything slow
        require_prices(self._deployments(), budget or BudgetSection())
        self._seed = seed
        self._api = LiteLLMApi()
        self._clients = {
            part: RoleClient(
                part,
                section,
                _deployments(place, section, self._api, shards),
                seed,
                self._api,
                journal=None if journal is None else RoleJournal(journal, part, section.model),
                observer=observer,
                require_room=self._require_room,
                shards=shards,
            )
            for parts in self._parts.values()
            for part, place, section in parts
        }
        self.budget = Budget(budget or BudgetSection(), journal, self._costs, go_on)

    def role(self, name: str, part: int | None = None) -> ChatLLM:
        """The client of one role; `part` of a mixture alone, where it is given. Raises UserError for a role that is not
        configured."""
        if name not in self._parts:
            raise UserError(f"{role_place(name)} is not set: name the model that plays it")
        parts = [self._clients[part] for part, _, _ in self._parts[name]]
        if part is not None:
            return parts[part]
        return parts[0] if len(parts) == 1 else _Mixture(parts, partial(self.part, name))

    def part(self, name: str, sample_index: int) -> int:
        """Which simulator of a mixture plays this sample: 0 is the section itself, then its `mixture` in order."""
        weights = [getattr(section, "weight", 1.0) for _, _, section in self._parts[name]]
        return draw_part(weights, self._seed, name, sample_index)

    def together(self, name: str, part: int) -> bool:
        """Whether simulator `part` of a mixture gets several first turns of a chat in one request."""
        _, _, section = self._parts[name][part]
        wanted = section.first_turns_together if isinstance(section, SimulatorSection) else False
        return self._api.takes_n(section) if wanted is None else wanted

    def check_models(self) -> None:
        """Raise UserError naming a model whose provider LiteLLM does not know: every call would fail."""
        for parts in self._parts.values():
            for _, role_at, section in parts:
                for place, deployment in _deployment_sections(role_at, section):
                    self._api.check_model(place, deployment, section.extra.get("custom_llm_provider"))

    def snapshot(self) -> GatewaySnapshot:
        """The current counters; `after - before` is what happened in between."""
        return GatewaySnapshot({name: client.counters() for name, client in self._clients.items()})

    async def check_reachable(self, timeout_s: float = 5.0) -> None:
        """Connect to every configured api_base once. Raises UserError naming role and address if nothing answers."""
        addresses: dict[str, str] = {}  # address -> the first place in the config that names it
        for place, deployment in self._deployments():
            if deployment.api_base is not None:
                addresses.setdefault(deployment.api_base, place)
        await asyncio.gather(*(_connect_once(place, base, timeout_s) for base, place in addresses.items()))

    async def close(self) -> None:
        """Close the connections. Calls in flight fail."""
        await self._api.close()

    def _deployments(self) -> Iterator[tuple[str, DeploymentSection]]:
        """All deployments of all roles, each with its place in the config."""
        for parts in self._parts.values():
            for _, place, section in parts:
                yield from _deployment_sections(place, section)

    def _require_room(self) -> None:
        self.budget.require_room(sum(client.usage.in_flight for client in self._clients.values()))

    def _costs(self) -> Costs:
        return {
            (name, client.section.model): (client.usage.answers, client.usage.cost_usd)
            for name, client in self._clients.items()
        }


class _Mixture:
    """Implements types.ChatLLM over the models that play one role."""

    def __init__(self, parts: Sequence[ChatLLM], draw: Callable[[int], int]) -> None:
        self._parts = parts
        self._draw = draw

    async def complete(self, request: LLMRequest[T]) -> list[T]:
        return await self._parts[self._draw(request.sample_index)].complete(request)


def draw_part(weights: Sequence[float], seed: int, role: str, sample_index: int) -> int:
    """An index, with shares by weight. A pure function: a conversation keeps its simulator in every turn."""
    if len(weights) == 1:
        return 0
    digest = hashlib.blake2b(f"{seed}/{role}/{sample_index}".encode(), digest_size=8).digest()
    bounds = list(itertools.accumulate(weights))
    return min(bisect.bisect_right(bounds, int.from_bytes(digest, "big") / 2**64 * bounds[-1]), len(weights) - 1)


def _parts(name: str, section: LLMSection) -> list[tuple[str, str, LLMSection]]:
    """(name of the counters, place in the config, section) of every model that plays the role."""
    others: tuple[SimulatorSection, ...] = section.mixture if isinstance(section, UserSection) else ()
    place = role_place(name)
    more = [(f"{name}-{index + 1}", f"{place}.mixture.{index}", other) for index, other in enumerate(others)]
    return [(name, place, section), *more]


def _deployment_sections(place: str, section: LLMSection) -> Iterator[tuple[str, DeploymentSection]]:
    """The section itself, which is its first deployment, then the further ones, each with its place in the config."""
    yield place, section
    for index, deployment in enumerate(section.deployments):
        yield f"{place}.deployments.{index}", deployment


def _deployments(role_at: str, section: LLMSection, api: LiteLLMApi, shards: int) -> Deployments:
    items = []
    for index, (place, deployment) in enumerate(_deployment_sections(role_at, section)):
        takes_schema = section.response_format == "json_schema" and api.takes_schema(deployment)
        endpoint = Endpoint(deployment, _read_key(place, deployment), price(deployment), takes_schema)
        api.know_price(place, endpoint)
        requests, tokens = deployment.requests_per_minute, deployment.tokens_per_minute
        items.append(
            Deployment(
                index,
                endpoint,
                requests=None if requests is None else RateLimit(requests / shards),
                tokens=None if tokens is None else RateLimit(tokens / shards),
                mean_completion_tokens=float(section.max_tokens),
            )
        )
    return Deployments(items, section.cooldown_s)


def _read_key(place: str, deployment: DeploymentSection) -> str | None:
    if deployment.api_key_env is None:
        return None
    key = os.environ.get(deployment.api_key_env)
    if not key:
        raise UserError(
            f"{place} needs an API key: set the environment variable {deployment.api_key_env}, "
            f"or {place}.api_key_env to null for a server that wants none"
        )
    return key


async def _connect_once(place: str, api_base: str, timeout_s: float) -> None:
    address = f"{place}.api_base {api_base}"
    found = host_and_port(api_base)
    if found is None:
        raise UserError(f"{address} is not a URL: it must look like http://host:port/v1")
    host, port = found
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError) as error:
        how = why_not_connected(error, address_of(api_base))
        raise UserError(f"{address}: nothing answers there ({how}); start that server or fix the address") from None
    writer.close()
