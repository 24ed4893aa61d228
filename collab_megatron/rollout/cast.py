"""Builds the players of the conversations from a config: engine pool, simulated user, judges, chat template."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from collab_megatron.config.entry import EvaluateConfig, RLConfig
from collab_megatron.config.roles import llm_roles
from collab_megatron.config.sections import DriverSection
from collab_megatron.data.chat import ChatTemplate, load_tokenizer
from collab_megatron.data.token_limit import fitting_tasks
from collab_megatron.engine.keys import EngineKeys
from collab_megatron.engine.pool import EnginePool
from collab_megatron.limiter import AdaptiveLimiter
from collab_megatron.rollout.busy import BusyClock
from collab_megatron.rollout.conversation import Limits, Players
from collab_megatron.rollout.journal import store
from collab_megatron.rollout.journal.store import Journal
from collab_megatron.rollout.lineage import lineage_of
from collab_megatron.rollout.llm import Gateway, SimulatorHealth, user_simulator
from collab_megatron.rollout.recorded_engine import RecordedEngine
from collab_megatron.rollout.rewards import configured_scorer
from collab_megatron.rollout.unexpected import Unexpected
from collab_megatron.types import Task

GC_THRESHOLDS = 100_000, 50, 1000
"""Thousands of conversations are under way at a time, each of many objects that live for seconds: the defaults walk
them over and over (10 % of a call's CPU)."""


@dataclass(frozen=True)
class Cast:
    """The players and the clients behind them whose counters go to the dashboard."""

    players: Players
    limits: Limits
    engine: EnginePool
    engine_slots: AdaptiveLimiter  # tokens of the policy turns in flight
    recorded: RecordedEngine
    gateway: Gateway
    health: SimulatorHealth
    journal: Journal | None


def open_journal(config: RLConfig) -> Journal:
    """The journal of a run; all driver processes share the file. Raises UserError for a file that is none."""
    default = config.run.dir / "journal" / f"{config.run.name}.sqlite"
    return store.open_journal(config.journal, default, lineage_of(config))


@asynccontextmanager
async def assemble(
    config: RLConfig | EvaluateConfig,
    *,
    engine_urls: Sequence[str],
    max_context_tokens: int,
    journal: Journal | None = None,
    engine_keys: EngineKeys | None = None,
) -> AsyncIterator[Cast]:
    """Clients that live as long as the block; `engine_keys` are those of engines that ask for some. Raises
    UserError for a missing key or an inexact chat template.

    The engines serve whatever weights they have; none are needed where `cast.engine.use` names them later. Without a
    journal nothing is kept.
    """
    rollout = config.rollout
    driver = config.driver if isinstance(config, RLConfig) else None
    shards, staleness = (driver.shards, driver.max_staleness) if driver else (1, 0)
    chat = ChatTemplate(load_tokenizer(config.model.path), thought_tags=rollout.thought_tags)
    difference = chat.check_growth(rollout.inexact_template)
    if difference is not None:
        print(f"rollout.inexact_template={rollout.inexact_template}: {difference}", flush=True)
    watched = config.simulators.health
    health = SimulatorHealth(watched.model_copy(update={"min_replies": max(1, watched.min_replies // shards)}))
    gateway = Gateway(
        llm_roles(config.simulators, config.reward),
        config.run.seed,
        journal=journal,
        observer=health,
        budget=config.budget,
        shards=shards,
        go_on="set run.resume=true" if driver else "start the evaluation again",
    )
    slots = AdaptiveLimiter(config.engine.max_running_tokens or float("inf"))
    async with EnginePool(
        stop_token_ids=chat.end_ids,
        request_timeout_s=(driver or DriverSection()).request_timeout_s,
        health_timeout_s=config.engine.health_timeout_s,
        work_timeout_s=config.engine.work_timeout_on("cuda" if config.parallel.device == "cuda" else "cpu"),
        max_concurrency=max(1, config.engine.max_concurrency // shards),
        max_running_tokens=config.engine.max_running_tokens,
        share=1 / shards,
        limiter=slots,
        updates_while_sampling=staleness > 0,
        wait_for_engines=driver is not None,
        keys=engine_keys,
    ) as engine:
        engine.use(engine_urls, None)
        recorded = RecordedEngine(engine, journal, slots, max_staleness=staleness if driver else None)
        gc.collect()
        gc.freeze()  # a large heap of imports that every later collection would walk: 15 % of a call's CPU
        gc.set_threshold(*GC_THRESHOLDS)
        try:
            yield Cast(
                players=Players(
                    engine=recorded,
                    user=user_simulator(config.simulators, gateway, health),
                    scorer=configured_scorer(config.reward, config.simulators, gateway),
                    chat=chat,
                    engine_clock=BusyClock(),
                    user_clock=BusyClock(),
                    judge_clock=BusyClock(),
                    unexpected=Unexpected(driver.max_unexpected_errors) if driver else Unexpected(),
                ),
                limits=Limits(
                    max_user_turns=rollout.max_user_turns,
                    max_assistant_turns=rollout.max_assistant_turns,
                    max_new_tokens=rollout.max_new_tokens,
                    max_context_tokens=max_context_tokens,
                    temperature=rollout.temperature,
                    cut_reply=rollout.cut_reply,
                    cut_penalty=rollout.cut_penalty,
                    termination_signal=config.simulators.user.termination_signal,
                    future_timeout_s=driver.future_timeout_s if driver else config.evaluation.timeout_s,
                ),
                engine=engine,
                engine_slots=slots,
                recorded=recorded,
                gateway=gateway,
                health=health,
                journal=journal,
            )
        finally:
            await gateway.close()


def usable_tasks(tasks: list[Task], cast: Cast, max_prompt_tokens: int) -> list[Task]:
    """The tasks whose prompt fits; prints how many do not. Raises UserError if that is more than half."""
    fit = fitting_tasks(
        tasks,
        cast.players.chat,
        max_prompt_tokens=max_prompt_tokens,
        max_context_tokens=cast.limits.max_context_tokens,
        max_new_tokens=cast.limits.max_new_tokens,
    )
    if fit.notice:
        print(fit.notice, flush=True)
    return fit.kept
