"""What the gateway's tests share: a config for endpoints on loopback, and a gateway around the body of a test."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from collab_megatron.config.sections import DeploymentSection, LLMSection
from collab_megatron.rollout.llm import Gateway, RoleUsage
from collab_megatron.rollout.llm.role_client import RoleClient
from collab_megatron.types import LLMRequest, Message

HELLO = LLMRequest([Message("user", "hello")], parse=str)
GOOD = "a good answer"


def hello(**changes: Any) -> LLMRequest[Any]:
    return replace(HELLO, **changes)


def good(body: dict[str, Any]) -> str:
    return GOOD


def config_for(*urls: str, provider: str = "hosted_vllm", **changes: Any) -> LLMSection:
    first, *more = urls
    others = tuple(DeploymentSection(model=f"{provider}/m", api_base=url, api_key_env=None) for url in more)
    fields: dict[str, Any] = {"timeout_s": 2.0, "deadline_s": 20.0, "max_attempts": 8, **changes}
    return LLMSection(model=f"{provider}/m", api_base=first, api_key_env=None, deployments=others, **fields)


def use_role(
    config: LLMSection, body: Callable[[RoleClient], Awaitable[Any]], *, limit_s: float = 60.0, **options: Any
) -> tuple[Any, RoleUsage]:
    """Run `body` with the one role of a gateway; (what it returned, the counters)."""

    async def main() -> tuple[Any, RoleUsage]:
        gateway = Gateway({"user": config}, 1, **options)
        try:
            async with asyncio.timeout(limit_s):
                role = gateway.role("user")
                assert isinstance(role, RoleClient)
                return await body(role), gateway.snapshot().roles["user"]
        finally:
            await gateway.close()

    return asyncio.run(main())


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
