"""The LLM gateway: the roles by name, their keys, their addresses and their counters.

    gateway = Gateway(llm_roles(config.simulators), config.run.seed)
    await gateway.check_reachable(timeout_s=5)
    replies = await gateway.role("user").complete([Message("user", "hello")])
    await gateway.close()

Make it anywhere; use it within one event loop.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from urllib.parse import urlsplit

from collab_megatron.config.sections import LLMSection
from collab_megatron.errors import UserError
from collab_megatron.simulators.failure import SimulatorError
from collab_megatron.simulators.litellm_api import LiteLLMApi
from collab_megatron.simulators.role import Role
from collab_megatron.simulators.usage import GatewaySnapshot
from collab_megatron.types import ChatLLM

__all__ = ["Gateway", "SimulatorError"]

DEFAULT_PORTS = {"http": 80, "https": 443}


class Gateway:
    """All LLM roles of a run. Raises UserError if a key's environment variable is not set."""

    def __init__(self, roles: Mapping[str, LLMSection], seed: int) -> None:
        keys = {name: _read_key(name, section) for name, section in roles.items()}
        self._api = LiteLLMApi()
        for name, section in roles.items():
            self._api.know_price(name, section)
        self._roles = {name: Role(name, section, keys[name], seed, self._api) for name, section in roles.items()}

    def role(self, name: str) -> ChatLLM:
        """The client of one role. Raises UserError for a role that is not configured."""
        if name not in self._roles:
            raise UserError(f"simulators.{name} is not set: name the model that plays it")
        return self._roles[name]

    def snapshot(self) -> GatewaySnapshot:
        """The counters as they stand; `after - before` is what happened in between."""
        return GatewaySnapshot({name: role.usage.copy() for name, role in self._roles.items()})

    async def check_reachable(self, timeout_s: float = 5.0) -> None:
        """Connect to every configured api_base once. Raises UserError naming role and address where nothing answers."""
        addresses: dict[str, str] = {}  # address -> the first role that uses it
        for name, role in self._roles.items():
            if role.section.api_base is not None:
                addresses.setdefault(role.section.api_base, name)
        await asyncio.gather(*(_connect_once(name, base, timeout_s) for base, name in addresses.items()))

    async def close(self) -> None:
        """Close the connections. Calls in flight fail."""
        await self._api.close()


def _read_key(role: str, section: LLMSection) -> str | None:
    if section.api_key_env is None:
        return None
    key = os.environ.get(section.api_key_env)
    if not key:
        raise UserError(
            f"simulators.{role} needs an API key: set the environment variable {section.api_key_env}, "
            f"or simulators.{role}.api_key_env to null for a server that wants none"
        )
    return key


async def _connect_once(role: str, api_base: str, timeout_s: float) -> None:
    where = f"simulators.{role}.api_base {api_base}"
    try:
        parts = urlsplit(api_base)
        port = parts.port or DEFAULT_PORTS.get(parts.scheme)
    except ValueError:
        raise UserError(f"{where} is not a URL") from None
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname:
        raise UserError(f"{where} is not a URL: it must look like http://host:port/v1")
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(parts.hostname, port)
    except (OSError, TimeoutError):
        raise UserError(f"{where}: nothing answers there; start that server or mend the address") from None
    writer.close()
