"""All checks before a process starts, so that a user's mistake ends the run in seconds, with one sentence."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from collab_megatron.config import BuildDatasetConfig, EvaluateConfig, RLConfig, SupervisedConfig
from collab_megatron.config.roles import llm_roles
from collab_megatron.config.sections import EngineSection, ParallelSection
from collab_megatron.data.chat import ChatTemplate, InexactTemplate, load_tokenizer
from collab_megatron.data.parquet import read_task_files
from collab_megatron.data.splits import shared_tasks
from collab_megatron.data.token_limit import FittingRows, fitting_tasks, max_context_tokens
from collab_megatron.data_engine.problems import read_problems
from collab_megatron.data_engine.worker import make_players
from collab_megatron.engine.server_args import engine_command
from collab_megatron.errors import UserError, masked
from collab_megatron.launch.colocation import with_share
from collab_megatron.launch.config_warnings import warn_of_build, warn_of_config, warn_of_memory, warn_of_players
from collab_megatron.launch.cost import build_calls, evaluation_calls, evaluations, lengths_of, step_calls
from collab_megatron.launch.engine_checks import check_context_length, check_engine, check_flags
from collab_megatron.launch.engine_versions import check_versions
from collab_megatron.launch.epochs import supervised_rows
from collab_megatron.launch.machine_checks import (
    check_disk_space,
    check_gpus,
    check_placement,
    check_process_count,
    check_trainer,
    started_ranks,
)
from collab_megatron.launch.node import Node, this_node
from collab_megatron.launch.path_checks import (
    check_file,
    check_folder,
    check_journal_file,
    check_prompt_files,
    check_run,
)
from collab_megatron.launch.placement import place
from collab_megatron.launch.placement_map import placement_lines
from collab_megatron.launch.plan import build_plan, evaluate_plan, rl_plan, supervised_plan
from collab_megatron.launch.start_point import StartPoint, find_start
from collab_megatron.model.folder import read_hf_config, resolve_model_folder
from collab_megatron.model.layout import check_layout
from collab_megatron.model.spec import ModelSpec, model_spec
from collab_megatron.model.tensor_check import check_tensors, tensor_shapes
from collab_megatron.rollout.llm import Gateway, evaluation_users, user_simulator
from collab_megatron.rollout.llm.health import SimulatorHealth
from collab_megatron.rollout.llm.pair_judge import pair_judge
from collab_megatron.rollout.llm.templates import proactive_message
from collab_megatron.rollout.rewards import configured_scorer
from collab_megatron.types import Task
from collab_megatron.wire.checkpoints import MARKER
from collab_megatron.wire.completion import is_exported, rl_missing, supervised_missing

REACH_TIMEOUT_S = 5.0
DEFAULT_PORT = 30000  # SGLang's default, in place of the free port that is found at the start

Report = Callable[[str], None]


def print_at_once(text: str) -> None:
    print(masked(text), flush=True)


@dataclass(frozen=True)
class RLStart(StartPoint):
    """The start of a run with engines and a driver."""

    max_context_tokens: int
    engine: EngineSection  # engine of the config, with mem_fraction decided


@dataclass(frozen=True)
class _Model:
    """A model without its weights."""

    hf_config: dict[str, Any]
    spec: ModelSpec
    chat: ChatTemplate


def check_rl(
    config: RLConfig, *, dry_run: bool = False, node: Node | None = None, report: Report = print_at_once
) -> RLStart:
    """All checks of train_rl; `report` gets the plan as soon as model and data are known. Raises UserError.

    dry_run: fetch no weights of a model on the hub. node: the machine to plan for; None: this machine.
    """
    node = node or this_node()
    model = check_model(config.model.path, config.parallel, config.rollout.inexact_template, weights=not dry_run)
    check_context_length(config.engine, model.spec)
    context_tokens = max_context_tokens(model.hf_config, config.engine)
    train, held_out = _check_prompts(config, model.chat, context_tokens)
    gateway = check_players(config, node)
    check_placement(config, node.device(config.parallel))
    shared = with_share(config, model.spec, node)
    calls = {
        "steps": (config.train.steps, step_calls(config, lengths_of(train))),
        "evaluations": (evaluations(config), evaluation_calls(config, lengths_of(held_out), len(held_out))),
    }
    report(rl_plan(shared, model.spec, node=node, calls=calls))
    report_placement(node, config.parallel, report, shared.engine, config.driver.shards)
    warn_of_config(config, model.spec, node)
    start = find_start(config, rl_missing, node)
    if not start.is_done:
        if node.here:
            check_journal_file(config.journal, config.run.dir / "journal" / f"{config.run.name}.sqlite")
        check_trainer(config.parallel, config.engine, node)
        if node.here:
            if config.sync.disk_dir is not None:
                check_folder("sync.disk_dir", config.sync.disk_dir)
            check_disk_space(config.run.dir, model.spec, config.model.dtype)
        check_engines(config, node)
        asyncio.run(check_reachable(gateway, node))
    return RLStart(start.first_step, start.missing, context_tokens, shared.engine)


def check_supervised(
    config: SupervisedConfig, *, dry_run: bool = False, node: Node | None = None, report: Report = print_at_once
) -> StartPoint:
    """All checks of train_sft and train_dpo, as `check_rl`. Raises UserError."""
    node = node or this_node()
    # chats are rendered whole and never grow
    model = check_model(config.model.path, config.parallel, "as_sampled", weights=not dry_run)
    for files in filter(None, (config.data.train_files, config.data.validation_files)):
        rows = supervised_rows(config, files, model.chat)
        if dry_run:  # in a run the trainer prints them
            print(*rows.notices, sep="\n", end="\n" * bool(rows.notices), flush=True)
    report(supervised_plan(config, model.spec, node=node))
    report_placement(node, config.parallel, report)
    warn_of_memory(config, model.spec, node)
    start = find_start(config, supervised_missing, node)
    if start.is_done:
        return start
    check_trainer(config.parallel, None, node)
    if node.here:
        check_disk_space(config.run.dir, model.spec, config.model.dtype)
    target = config.export_hf
    own = start.missing is not None and is_exported(config)
    if target is not None and node.here:
        check_folder("export_hf", target)
        if not own and target.exists() and any(target.iterdir()):
            raise UserError(f"export_hf={target} exists and is not empty: choose another folder, or remove it")
    return start


def check_evaluate(
    config: EvaluateConfig, *, dry_run: bool = False, node: Node | None = None, report: Report = print_at_once
) -> dict[str, int]:
    """All checks of an evaluation, as `check_rl`; returns path -> context length in tokens of each model that SGLang
    serves. Raises UserError."""
    node = node or this_node()
    if node.hosts:
        raise UserError("an evaluation runs on one node: leave --nodes and --hosts out")
    one_rank = ParallelSection(device=config.parallel.device)
    models: dict[str, _Model] = {}
    context_tokens: dict[str, int] = {}
    held_out = tasks = read_task_files(config.data.validation_files)[0]
    for path in config.served:
        model = check_model(path, one_rank, config.rollout.inexact_template, weights=not dry_run)
        check_context_length(config.engine, model.spec)
        models[path] = model
        context_tokens[path] = max_context_tokens(model.hf_config, config.engine)
        fit = fitting_prompts(config, held_out, model.chat, context_tokens[path])
        if fit.notice and dry_run:  # in a run the evaluation prints it
            print(fit.notice, flush=True)
        tasks = fit.kept
    if not models:  # the tokenizer of model.path counts the tokens of API models
        folder = resolve_model_folder(config.model.path, weights=False)
        ChatTemplate(load_tokenizer(folder)).check_growth(config.rollout.inexact_template)
    gateway = check_players(config, node)
    calls = evaluation_calls(config, lengths_of(tasks), len(tasks))
    specs = {path: model.spec for path, model in models.items()}
    report(evaluate_plan(config, specs, node=node, tasks=len(tasks), calls=calls))
    warn_of_players(config)
    check_gpus(config.parallel, started_ranks(config.engine) if models else 0, node)
    if node.here:
        check_run(config.run)
        output = config.output or config.run.evaluations_dir / "model.json"
        check_file("output", output)
        journal = config.journal.path
        check_folder("journal.path", config.run.dir / "journal" if journal is None else journal.parent)
    if models:
        check_engines(config, node)
    asyncio.run(check_reachable(gateway, node))
    return context_tokens


def check_build(config: BuildDatasetConfig, *, dry_run: bool = False, report: Report = print_at_once) -> None:
    """All checks of tools/build_dataset.py, as `check_rl`. Raises UserError."""
    check_folder("output", config.output)
    check_journal_file(config.journal, config.output / "journal.sqlite")
    check_prompt_files(config)
    check_process_count("processes", config.processes)
    problems = read_problems(config)
    for notice in problems.notices:
        report(notice)
    tasks = [problem.task for problem in problems.chosen]
    gateway = Gateway(llm_roles(config.simulators, config.reward), config.seed, budget=config.budget)
    gateway.check_models()
    if config.model is not None:
        model = check_model(
            config.model.path, ParallelSection(device=config.parallel.device), "as_sampled", weights=not dry_run
        )
        check_context_length(config.engine, model.spec)
        check_gpus(config.parallel, started_ranks(config.engine), this_node())
        check_engine(config.engine)
    make_players(config, gateway)
    report(build_plan(config, tasks, build_calls(config, tasks)))
    warn_of_build(config)
    asyncio.run(check_reachable(gateway, this_node()))


def _check_prompts(config: RLConfig, chat: ChatTemplate, context_tokens: int) -> tuple[list[Task], list[Task]]:
    """The prompts that fit, to train on and held out; prints what is left out. Raises UserError where over half of a
    set is too long."""
    kept = []
    for files in (config.data.train_files, config.data.validation_files):
        tasks, repeated = read_task_files(files)
        names = ", ".join(map(str, files))
        if repeated:
            print(f"{names}: left out: {repeated:,} tasks that an earlier file holds", flush=True)
        fit = fitting_prompts(config, tasks, chat, context_tokens)
        if fit.notice:
            print(f"{names}: {fit.notice}", flush=True)
        kept.append(fit.kept)
    train, held_out = kept
    if shared := shared_tasks((task.single_turn_prompt for task in train), (t.single_turn_prompt for t in held_out)):
        print(
            f"warning: {len(shared):,} held-out tasks are trained on too, so held-out figures will be too good: "
            "tools/prepare_dataset.py keeps the two apart",
            flush=True,
        )
    return train, held_out


def fitting_prompts(
    config: RLConfig | EvaluateConfig, tasks: Sequence[Task], chat: ChatTemplate, context_tokens: int
) -> FittingRows[Task]:
    return fitting_tasks(
        tasks,
        chat,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        max_context_tokens=context_tokens,
        max_new_tokens=config.rollout.max_new_tokens,
    )


def check_model(path: str, parallel: ParallelSection, inexact_template: InexactTemplate, *, weights: bool) -> _Model:
    folder = resolve_model_folder(path, weights=weights)
    hf_config = read_hf_config(folder)
    check_layout(hf_config, parallel)
    spec = model_spec(hf_config)
    in_checkpoint = (folder.parent / MARKER).is_file()  # config and tokenizer only: the conversion checks the weights
    if not in_checkpoint:
        check_tensors(tensor_shapes(path, folder), spec, path)
    chat = ChatTemplate(load_tokenizer(folder))
    chat.check_growth(inexact_template)
    return _Model(hf_config, spec, chat)


def report_placement(
    node: Node, parallel: ParallelSection, report: Report, engine: EngineSection | None = None, shards: int = 0
) -> None:
    """The map of a job of several nodes. Raises UserError where the layout does not fit on them."""
    if node.hosts:
        placement = place(node.hosts, parallel, engine, device=node.device(parallel), shards=shards)
        report("\n".join(placement_lines(placement, parallel)))


def check_engines(config: RLConfig | EvaluateConfig, node: Node) -> None:
    """Interpreter, address and ports; last the flags, because that imports SGLang (some seconds)."""
    engine = config.engine
    if node.here:
        check_engine(engine)
        if isinstance(config, RLConfig):
            check_versions(engine, config.sync, node.device(config.parallel))
    if node.here and engine.extra_args and not engine.urls:
        check_flags(
            engine_command(
                engine,
                model_path=config.model.path,
                dtype=config.model.dtype,
                device=node.device(config.parallel),
                port=engine.port or DEFAULT_PORT,
                seed=config.run.seed,
            )
        )


def check_players(config: RLConfig | EvaluateConfig, node: Node) -> Gateway:
    """Metrics, their modules, prompt files, keys and prices; no LLM is called."""
    check_prompt_files(config)
    SimulatorHealth(config.simulators.health)
    roles = llm_roles(config.simulators, config.reward) | config.extra_roles
    gateway = Gateway(roles, config.run.seed, budget=config.budget)
    gateway.check_models()
    configured_scorer(config.reward, config.simulators, gateway, here=node.here)
    user_simulator(config.simulators, gateway)
    evaluation_users(config.simulators, config.evaluation, gateway)
    if isinstance(config, EvaluateConfig):
        for row in config.rows.values():
            proactive_message(row.proactive_prompt_file)
        if config.compare.judged_pairs:
            pair_judge(config.simulators, config.compare, gateway)
    return gateway


async def check_reachable(gateway: Gateway, node: Node) -> None:
    try:
        if node.here:
            await gateway.check_reachable(REACH_TIMEOUT_S)
    finally:
        await gateway.close()
