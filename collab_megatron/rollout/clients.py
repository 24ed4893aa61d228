"""Opens the clients of a run from its config: engine pool, user simulator, judges, journal, chat template."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from collab_megatron.config.entry import EvaluateConfig, RLConfig
from collab_megatron.config.roles import MODEL_OF, llm_roles
from collab_megatron.config.sections import DriverSection, EvaluationSection
from collab_megatron.data.chat import ChatTemplate, load_tokenizer
from collab_megatron.data.token_limit import fitting_tasks
from collab_megatron.engine.keys import EngineKeys
from collab_megatron.engine.pool import EnginePool
from collab_megatron.limiter import AdaptiveLimiter
from collab_megatron.rollout.api_model import ApiModel
from collab_megatron.rollout.busy import BusyClock
from collab_megatron.rollout.future import Limits, Players
from collab_megatron.rollout.journal import store
from collab_megatron.rollout.journal.store import Journal
from collab_megatron.rollout.journaled_engine import JournaledEngine
from collab_megatron.rollout.lineage import lineage_of
from collab_megatron.rollout.llm import Gateway, SimulatorHealth, evaluation_users, user_simulator
from collab_megatron.rollout.rewards import configured_scorer
from collab_megatron.rollout.rewards.second_judge import configured_second_judge
from collab_megatron.rollout.unexpected_errors import UnexpectedErrors
from collab_megatron.types import Task, UserSimulator

GC_THRESHOLDS = 100_000, 50, 1000
"""Thousands of concurrent conversations have many objects that live for seconds. With the default thresholds the
garbage collector scans them again and again, at 10 % of a call's CPU time."""


@dataclass(frozen=True)
class RolloutClients:
    """The players of the conversations, and the clients behind them with counters for the dashboard."""

    players: Players
    limits: Limits
    pool: EnginePool
    engine_limiter: AdaptiveLimiter  # unit: tokens of the policy turns in flight
    engine: JournaledEngine  # `pool` behind journal and limiter: conversations sample here
    gateway: Gateway
    health: SimulatorHealth
    journal: Journal | None
    # name -> simulated user of an evaluation, that of the config as "" and first; empty: that of `players`
    evaluation_users: Mapping[str, UserSimulator] = field(default_factory=dict)
    # row of an evaluation's table -> the API model in the place of the policy
    api_models: Mapping[str, ApiModel] = field(default_factory=dict)


def open_journal(config: RLConfig) -> Journal:
    """The journal of a run; all driver processes share the file. Raises UserError for a file that is not a journal."""
    default = config.run.dir / "journal" / f"{config.run.name}.sqlite"
    return store.open_journal(config.journal, default, lineage_of(config))


@asynccontextmanager
async def open_clients(
    config: RLConfig | EvaluateConfig,
    *,
    engine_urls: Sequence[str],
    max_context_tokens: int,
    journal: Journal | None = None,
    engine_keys: EngineKeys | None = None,
) -> AsyncIterator[RolloutClients]:
    """Clients that live as long as the block.

    `engine_urls` may be empty: `clients.pool.use` names engines later. `engine_keys`: API keys of engines that require
    them. Without a journal nothing is kept. Raises UserError for a missing key or an inexact chat template.
    """
    rollout = config.rollout
    driver = config.driver if isinstance(config, RLConfig) else None
    shards, staleness = (driver.shards, driver.max_staleness) if driver else (1, 0)
    chat = ChatTemplate(load_tokenizer(config.model.path), thought_tags=rollout.thought_tags)
    go_on = "start the same command again, training with run.resume=true," if driver else "start the evaluation again"
    difference = chat.check_growth(rollout.inexact_template)
    if difference is not None:
        print(f"rollout.inexact_template={rollout.inexact_template}: {difference}", flush=True)
    watched = config.simulators.health
    health = SimulatorHealth(watched.model_copy(update={"min_replies": max(1, watched.min_replies // shards)}))
    gateway = Gateway(
        llm_roles(config.simulators, config.reward) | config.extra_roles,
        config.run.seed,
        journal=journal,
        observer=health,
        budget=config.budget,
        shards=shards,
        go_on=go_on,
    )
    limiter = AdaptiveLimiter(config.engine.max_running_tokens or float("inf"))
    async with EnginePool(
        stop_token_ids=chat.end_ids,
        request_timeout_s=driver.request_timeout_s if driver else _request_timeout_s(config.evaluation),
        health_timeout_s=config.engine.health_timeout_s,
        work_timeout_s=config.engine.work_timeout_on("cuda" if config.parallel.device == "cuda" else "cpu"),
        max_concurrency=max(1, config.engine.max_concurrency // shards),
        max_running_tokens=config.engine.max_running_tokens,
        share=1 / shards,
        limiter=limiter,
        updates_while_sampling=staleness > 0,
        wait_for_engines=driver is not None,
        keys=engine_keys,
    ) as pool:
        pool.use(engine_urls, None)
        engine = JournaledEngine(pool, journal, limiter, max_staleness=staleness if driver else None)
        gc.collect()
        gc.freeze()  # later collections skip the objects of the imports: 15 % of a call's CPU time
        gc.set_threshold(*GC_THRESHOLDS)
        user = user_simulator(config.simulators, gateway, health)
        try:
            yield RolloutClients(
                players=Players(
                    engine=engine,
                    user=user,
                    together=user,
                    scorer=configured_scorer(config.reward, config.simulators, gateway),
                    second_judge=configured_second_judge(config.reward, config.simulators, gateway) if driver else None,
                    chat=chat,
                    engine_clock=BusyClock(),
                    user_clock=BusyClock(),
                    judge_clock=BusyClock(),
                    unexpected=UnexpectedErrors(driver.max_unexpected_errors) if driver else UnexpectedErrors(),
                ),
                limits=Limits(
                    max_user_turns=rollout.max_user_turns,
                    max_assistant_turns=rollout.max_assistant_turns,
                    max_new_tokens=rollout.max_new_tokens,
                    max_context_tokens=max_context_tokens,
                    temperature=rollout.temperature,
                    cut_reply=rollout.cut_reply,
                    cut_penalty=rollout.cut_penalty,
                    keep_contexts=isinstance(config, RLConfig) and config.algorithm.credit == "tree",
                    termination_signal=config.simulators.user.termination_signal,
                    future_timeout_s=driver.future_timeout_s if driver else config.evaluation.timeout_s,
                ),
                pool=pool,
                engine_limiter=limiter,
                engine=engine,
                gateway=gateway,
                health=health,
                journal=journal,
                api_models={
                    role.removeprefix(MODEL_OF): ApiModel(gateway.role(role), chat.turn_ids, rollout.thought_tags)
                    for role in config.extra_roles
                    if role.startswith(MODEL_OF)
                },
                evaluation_users=evaluation_users(config.simulators, config.evaluation, gateway, health),
            )
        finally:
            await gateway.close()


def _request_timeout_s(evaluation: EvaluationSection) -> float:
    """Deadline of one generate call of an evaluation without a driver section: the driver's default, or half the
    evaluation's deadline."""
    return max(DriverSection().request_timeout_s, evaluation.timeout_s / 2)


def usable_tasks(tasks: list[Task], clients: RolloutClients, max_prompt_tokens: int) -> list[Task]:
    """The tasks with a prompt that fits; prints how many do not. Raises UserError if more than half do not fit."""
    fit = fitting_tasks(
        tasks,
        clients.players.chat,
        max_prompt_tokens=max_prompt_tokens,
        max_context_tokens=clients.limits.max_context_tokens,
        max_new_tokens=clients.limits.max_new_tokens,
    )
    if fit.notice:
        print(fit.notice, flush=True)
    return fit.kept
