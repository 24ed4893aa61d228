"""The LLM gateway: the roles by name, their keys, their addresses and their counters.

    roles = llm_roles(config.simulators, config.reward)
    gateway = Gateway(roles, config.run.seed, journal=journal, budget=config.budget)
    await gateway.check_reachable(timeout_s=5)
    replies = await gateway.role("user").complete([Message("user", "hello")])
    await gateway.close()

Make it anywhere; use it within one event loop. A role that several models play has one counter set for each: `user`,
`user-1`, ... A metric's own judge is the role `judge-METRIC`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping
from functools import partial

from collab_megatron.config.roles import role_place
from collab_megatron.config.sections import BudgetSection, DeploymentSection, LLMSection, SimulatorSection, UserSection
from collab_megatron.config.sections.addresses import host_and_port
from collab_megatron.errors import UserError
from collab_megatron.rollout.journal.store import Journal
from collab_megatron.rollout.llm.budget import Budget, Costs
from collab_megatron.rollout.llm.deployments import Deployment, Deployments
from collab_megatron.rollout.llm.failure import SimulatorError, address_of, why_not_connected
from collab_megatron.rollout.llm.litellm_api import Endpoint, LiteLLMApi
from collab_megatron.rollout.llm.mixture import Mixture, draw_part
from collab_megatron.rollout.llm.pacing import Bucket
from collab_megatron.rollout.llm.prices import price, require_prices
from collab_megatron.rollout.llm.recorded import Recorded
from collab_megatron.rollout.llm.role import Observer, Role
from collab_megatron.rollout.llm.usage import GatewaySnapshot
from collab_megatron.types import ChatLLM

__all__ = ["Gateway", "SimulatorError"]


class Gateway:
    """All LLM roles of a run. Raises UserError if a key's environment variable is not set, or if the budget has a cap
    in dollars and a model has no known price."""

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
        """`shards`: processes with a gateway each; all limits of the config are divided among them. `go_on`: how a run
        that spent its budget goes on, for the sentence at the cap."""
        for name, section in roles.items():
            for where, way in _ways(name, section):
                _read_key(where, way)  # before anything slow
        all_ways = (way for name, section in roles.items() for way in _ways(name, section))
        require_prices(all_ways, budget or BudgetSection())
        self._seed = seed
        self._api = LiteLLMApi()
        self._parts = {name: _parts(name, section) for name, section in roles.items()}
        self._roles = {
            part: Role(
                part,
                section,
                _deployments(part, where, section, self._api, shards),
                seed,
                self._api,
                recorded=None if journal is None else Recorded(journal, part, section.model),
                observer=observer,
                require_room=self._require_room,
                shards=shards,
            )
            for parts in self._parts.values()
            for part, where, section in parts
        }
        self.budget = Budget(budget or BudgetSection(), journal, self._costs, go_on)

    def role(self, name: str) -> ChatLLM:
        """The client of one role. Raises UserError for a role that is not configured."""
        if name not in self._parts:
            raise UserError(f"{role_place(name)} is not set: name the model that plays it")
        parts = [self._roles[part] for part, _, _ in self._parts[name]]
        return parts[0] if len(parts) == 1 else Mixture(parts, partial(self.part, name))

    def part(self, name: str, sample_index: int) -> int:
        """Which simulator of a mixture plays this sample: 0 is the section itself, then its `mixture` in order."""
        weights = [getattr(section, "weight", 1.0) for _, _, section in self._parts[name]]
        return draw_part(weights, self._seed, name, sample_index)

    def check_models(self) -> None:
        """Raise UserError naming a model of which LiteLLM does not know the provider: every call would fail."""
        for parts in self._parts.values():
            for _, where, section in parts:
                for place, way in _deployment_ways(where, section):
                    self._api.check_model(place, way.model, way.api_base, section.extra.get("custom_llm_provider"))

    def snapshot(self) -> GatewaySnapshot:
        """The counters as they stand; `after - before` is what happened in between."""
        return GatewaySnapshot({name: role.counters() for name, role in self._roles.items()})

    async def check_reachable(self, timeout_s: float = 5.0) -> None:
        """Connect to every configured api_base once. Raises UserError naming role and address where nothing answers."""
        addresses: dict[str, str] = {}  # address -> the first place of the config that names it
        for parts in self._parts.values():
            for _, where, section in parts:
                for place, way in _deployment_ways(where, section):
                    if way.api_base is not None:
                        addresses.setdefault(way.api_base, place)
        await asyncio.gather(*(_connect_once(where, base, timeout_s) for base, where in addresses.items()))

    async def close(self) -> None:
        """Close the connections. Calls in flight fail."""
        await self._api.close()

    def _require_room(self) -> None:
        self.budget.require_room(sum(role.usage.in_flight for role in self._roles.values()))

    def _costs(self) -> Costs:
        return {
            (name, role.section.model): (role.usage.answers, role.usage.cost_usd) for name, role in self._roles.items()
        }


def _parts(name: str, section: LLMSection) -> list[tuple[str, str, LLMSection]]:
    """(name of the counters, place in the config, section) of everyone who plays the role."""
    others: tuple[SimulatorSection, ...] = section.mixture if isinstance(section, UserSection) else ()
    place = role_place(name)
    more = [(f"{name}-{index + 1}", f"{place}.mixture.{index}", other) for index, other in enumerate(others)]
    return [(name, place, section), *more]


def _deployment_ways(where: str, section: LLMSection) -> Iterator[tuple[str, LLMSection | DeploymentSection]]:
    """The section's own deployment, then the further ones, each with its place in the config."""
    yield where, section
    for index, deployment in enumerate(section.deployments):
        yield f"{where}.deployments.{index}", deployment


def _ways(name: str, section: LLMSection) -> Iterator[tuple[str, LLMSection | DeploymentSection]]:
    for _, where, part in _parts(name, section):
        yield from _deployment_ways(where, part)


def _deployments(name: str, where: str, section: LLMSection, api: LiteLLMApi, shards: int) -> Deployments:
    items = []
    for index, (place, way) in enumerate(_deployment_ways(where, section)):
        endpoint = Endpoint(
            model=way.model,
            api_base=way.api_base,
            key=_read_key(place, way),
            price=price(way),
            json_mode=section.json_mode,
            json_schema=section.json_schema and api.can_schema(way.model, way.api_base),
        )
        api.know_price(place, endpoint)
        requests = None if way.requests_per_minute is None else Bucket(way.requests_per_minute / shards)
        tokens = None if way.tokens_per_minute is None else Bucket(way.tokens_per_minute / shards)
        items.append(Deployment(index, endpoint, requests, tokens, mean_completion_tokens=float(section.max_tokens)))
    models = [item.endpoint.model for item in items]
    router = None if len(items) == 1 else api.router(name, models, section.cooldown_s)
    return Deployments(name, items, section.cooldown_s, router)


def _read_key(where: str, way: LLMSection | DeploymentSection) -> str | None:
    if way.api_key_env is None:
        return None
    key = os.environ.get(way.api_key_env)
    if not key:
        raise UserError(
            f"{where} needs an API key: set the environment variable {way.api_key_env}, "
            f"or {where}.api_key_env to null for a server that wants none"
        )
    return key


async def _connect_once(where: str, api_base: str, timeout_s: float) -> None:
    place = f"{where}.api_base {api_base}"
    found = host_and_port(api_base)
    if found is None:
        raise UserError(f"{place} is not a URL: it must look like http://host:port/v1")
    host, port = found
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError) as error:
        how = why_not_connected(error, address_of(api_base))
        raise UserError(f"{place}: nothing answers there ({how}); start that server or fix the address") from None
    writer.close()
