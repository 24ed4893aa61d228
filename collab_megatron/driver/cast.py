"""Builds the players of the conversations from a config: engine pool, simulated user, judges, chat template."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from collab_megatron.config.entry import EvaluateConfig, RLConfig, llm_roles
from collab_megatron.data.chat import ChatTemplate, load_tokenizer
from collab_megatron.driver.conversation import Limits, Players
from collab_megatron.engine.pool import EnginePool
from collab_megatron.errors import UserError
from collab_megatron.monitor.busy import BusyClock
from collab_megatron.rewards import configured_scorer
from collab_megatron.simulators import Gateway, LLMUserSimulator
from collab_megatron.types import Task


@dataclass(frozen=True)
class Cast:
    """The players and the clients behind them whose counters go to the dashboard."""

    players: Players
    limits: Limits
    engine: EnginePool
    gateway: Gateway


@asynccontextmanager
async def assemble(
    config: RLConfig | EvaluateConfig, *, engine_urls: Sequence[str], max_context_tokens: int
) -> AsyncIterator[Cast]:
    """Clients that live as long as the block. Raises UserError for a missing key or an inexact chat template.

    The engines serve whatever weights they have; none are needed where `cast.engine.use` names them later.
    """
    chat = ChatTemplate(load_tokenizer(config.model.path))
    chat.check_exact()
    gateway = Gateway(llm_roles(config.simulators), config.run.seed)
    rollout = config.rollout
    async with EnginePool(
        stop_token_ids=chat.end_ids,
        request_timeout_s=config.engine.request_timeout_s,
        health_timeout_s=config.engine.health_timeout_s,
        max_concurrency=config.engine.max_concurrency,
    ) as engine:
        engine.use(engine_urls, None)
        gc.collect()
        gc.freeze()  # a large heap of imports that every later collection would walk: 15 % of a call's CPU
        try:
            yield Cast(
                players=Players(
                    engine=engine,
                    user=LLMUserSimulator(gateway.role("user"), config.simulators.user.prompt_file),
                    scorer=configured_scorer(config.reward, config.simulators, gateway),
                    chat=chat,
                    engine_clock=BusyClock(),
                    user_clock=BusyClock(),
                    judge_clock=BusyClock(),
                ),
                limits=Limits(
                    max_user_turns=rollout.max_user_turns,
                    max_assistant_turns=rollout.max_assistant_turns,
                    max_new_tokens=rollout.max_new_tokens,
                    max_context_tokens=max_context_tokens,
                    temperature=rollout.temperature,
                ),
                engine=engine,
                gateway=gateway,
            )
        finally:
            await gateway.close()


def usable_tasks(tasks: list[Task], cast: Cast, max_prompt_tokens: int) -> list[Task]:
    """The tasks whose prompt fits. Raises UserError if none does."""
    room = min(max_prompt_tokens, cast.limits.max_context_tokens - cast.limits.max_new_tokens)
    fitting = [task for task in tasks if len(cast.players.chat.prompt_ids(task.prompt)) <= room]
    if not fitting:
        raise UserError(
            f"none of the {len(tasks)} prompts fits into {room} tokens: raise rollout.max_prompt_tokens or lower "
            "rollout.max_new_tokens"
        )
    return fitting
