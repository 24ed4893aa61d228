"""Every check that can be made before a process is started: a user's mistake ends in seconds, with one sentence."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collab_megatron.checkpoint.folders import MARKER, named_checkpoint, newest_complete, read_info
from collab_megatron.checkpoint.origin import decisive_differences
from collab_megatron.cluster.cautions import warn_of_config, warn_of_memory, warn_of_prompts
from collab_megatron.cluster.cost import build_calls, evaluation_calls, evaluations, lengths_of, step_calls
from collab_megatron.cluster.node import Node, this_node
from collab_megatron.cluster.plan import build_plan, evaluate_plan, rl_plan, sft_plan
from collab_megatron.cluster.processes import port_in_use
from collab_megatron.config import BuildDatasetConfig, EvaluateConfig, RLConfig, SFTConfig
from collab_megatron.config.entry import llm_roles
from collab_megatron.config.sections import EngineSection, ParallelSection
from collab_megatron.convert.inventory import check_inventory, tensor_shapes
from collab_megatron.convert.layout import check_layout, read_hf_config
from collab_megatron.convert.source import resolve_model_folder
from collab_megatron.convert.spec import ModelSpec, model_spec
from collab_megatron.convert.tables import parameter_count
from collab_megatron.data.build.problems import read_problems
from collab_megatron.data.build.worker import make_players
from collab_megatron.data.chat import ChatTemplate, InexactTemplate, load_tokenizer
from collab_megatron.data.fit import fitting_tasks
from collab_megatron.data.parquet import read_task_files
from collab_megatron.data.sft_rows import read_sft_rows
from collab_megatron.data.splits import shared_tasks
from collab_megatron.errors import UserError, masked
from collab_megatron.rewards import configured_scorer
from collab_megatron.simulators import Gateway, user_simulator
from collab_megatron.types import Task

REACH_TIMEOUT_S = 5.0
CHECKPOINT_COPIES = 2
"""Room that saving needs: the checkpoint being written beside the one it replaces."""

Report = Callable[[str], None]


def print_at_once(text: str) -> None:
    print(masked(text), flush=True)


@dataclass(frozen=True)
class RLStart:
    """What the checks found out on the way."""

    first_step: int
    max_context_tokens: int
    usable_prompts: int  # training tasks whose prompt fits


@dataclass(frozen=True)
class _Model:
    """What is known of a model without its weights."""

    folder: Path
    hf_config: dict[str, Any]
    spec: ModelSpec
    chat: ChatTemplate


def check_rl(
    config: RLConfig, *, dry_run: bool = False, node: Node | None = None, report: Report = print_at_once
) -> RLStart:
    """All checks of train_rl; `report` gets the plan as soon as model and data are known. Raises UserError.

    dry_run: of a model on the hub fetch no weights. node: the one to plan for; None: this machine.
    """
    here = node or this_node()
    model = _check_model(config.model.path, config.parallel, config.rollout.inexact_template, weights=not dry_run)
    room = max_context_tokens(model.hf_config, config.engine)
    train, held_out = _check_prompts(config, model.chat, room)
    gateway = _check_players(config)
    check_placement(config, here.device(config.parallel))
    calls = {"steps": (config.train.steps, step_calls(config, lengths_of(train)))}
    calls["evaluations"] = (
        evaluations(config),
        evaluation_calls(config, lengths_of(held_out), len(held_out)),
    )
    report(rl_plan(config, model.spec, node=here, calls=calls))
    warn_of_config(config, model.spec, here)
    first_step = _check_run(config)
    _check_trainer_devices(config.parallel, config.engine, here)
    _check_machine(config, model.hf_config, here)
    asyncio.run(_check_reachable(gateway, here))
    return RLStart(first_step=first_step, max_context_tokens=room, usable_prompts=len(train))


def check_sft(
    config: SFTConfig, *, dry_run: bool = False, node: Node | None = None, report: Report = print_at_once
) -> None:
    """All checks of train_sft, as `check_rl`. Raises UserError."""
    here = node or this_node()
    # chats are rendered, none grows
    model = _check_model(config.model.path, config.parallel, "as_sampled", weights=not dry_run)
    for files in filter(None, (config.data.train_files, config.data.validation_files)):
        rows = read_sft_rows(files, model.chat, config.max_tokens)
        if dry_run:  # at a start the trainer tells
            print(*rows.notices, sep="\n", end="\n" * bool(rows.notices), flush=True)
    report(sft_plan(config, model.spec, node=here))
    warn_of_memory(config, model.spec, here)
    _check_run(config)
    _check_trainer_devices(config.parallel, None, here)
    if here.here:
        _check_disk(config.run.dir, model.hf_config, config.model.dtype)
    target = config.export_hf
    if target is not None and target.exists() and any(target.iterdir()):
        raise UserError(f"export_hf {target} exists and is not empty: choose another folder or remove it")


def check_evaluate(
    config: EvaluateConfig, *, dry_run: bool = False, node: Node | None = None, report: Report = print_at_once
) -> int:
    """All checks of an evaluation, as `check_rl`; returns the context length. Raises UserError."""
    here = node or this_node()
    one = ParallelSection(device=config.parallel.device)
    model = _check_model(config.model.path, one, config.rollout.inexact_template, weights=not dry_run)
    room = max_context_tokens(model.hf_config, config.engine)
    fit = fitting_tasks(
        read_task_files(config.data.validation_files)[0],
        model.chat,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        max_context_tokens=room,
        max_new_tokens=config.rollout.max_new_tokens,
    )
    if fit.notice and dry_run:  # at a start the evaluation tells
        print(fit.notice, flush=True)
    tasks = fit.kept
    gateway = _check_players(config)
    calls = evaluation_calls(config, lengths_of(tasks), len(tasks))
    report(evaluate_plan(config, model.spec, node=here, tasks=len(tasks), calls=calls))
    warn_of_prompts(config.simulators)
    _check_gpus(config.parallel, _started_ranks(config.engine), here)
    if here.here:
        _check_engine(config.engine)
    asyncio.run(_check_reachable(gateway, here))
    return room


def check_build(config: BuildDatasetConfig, *, report: Report = print_at_once) -> None:
    """All checks of tools/build_dataset.py, as `check_rl`, but for those of its output folder. Raises UserError."""
    tasks = [problem.task for problem in read_problems(config.problems, config.num_conversations)]
    gateway = Gateway(llm_roles(config.simulators, config.reward), config.seed, budget=config.budget)
    make_players(config, gateway)
    report(build_plan(config, tasks, build_calls(config, tasks)))
    warn_of_prompts(config.simulators)
    asyncio.run(_check_reachable(gateway, this_node()))


def _check_prompts(config: RLConfig, chat: ChatTemplate, max_context_tokens: int) -> tuple[list[Task], list[Task]]:
    """The prompts that fit, to train on and held out; prints what is left out. Raises UserError where over half of a
    set is too long."""
    kept = []
    for files in (config.data.train_files, config.data.validation_files):
        tasks, repeated = read_task_files(files)
        names = ", ".join(map(str, files))
        if repeated:
            print(f"{names}: left out: {repeated:,} tasks that an earlier file holds", flush=True)
        fit = fitting_tasks(
            tasks,
            chat,
            max_prompt_tokens=config.rollout.max_prompt_tokens,
            max_context_tokens=max_context_tokens,
            max_new_tokens=config.rollout.max_new_tokens,
        )
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


def max_context_tokens(hf_config: dict[str, Any], engine: EngineSection) -> int:
    """Tokens that prompt and reply may take together in the engine."""
    limits = [limit for limit in (engine.context_length, hf_config.get("max_position_embeddings")) if limit]
    return min(limits) if limits else 2**31 - 1


def _check_model(path: str, parallel: ParallelSection, inexact_template: InexactTemplate, *, weights: bool) -> _Model:
    folder = resolve_model_folder(path, weights=weights)
    hf_config = read_hf_config(folder)
    check_layout(hf_config, parallel)
    spec = model_spec(hf_config)
    in_checkpoint = (folder.parent / MARKER).is_file()  # config and tokenizer alone: converting checks the weights
    if not in_checkpoint:
        check_inventory(tensor_shapes(path, folder), spec, path)
    chat = ChatTemplate(load_tokenizer(folder))
    chat.check_growth(inexact_template)
    return _Model(folder, hf_config, spec, chat)


def _check_run(config: RLConfig | SFTConfig) -> int:
    """The first step to run. A fresh run must not write over an earlier one's checkpoints, nor go on with another's."""
    run, steps = config.run, config.train.steps
    newest = newest_complete(run.checkpoints_dir)
    if newest is None:
        if run.init_from is not None:
            named_checkpoint(run.init_from)
        return 0
    if not run.resume:
        raise UserError(
            f"{run.checkpoints_dir} holds checkpoints of an earlier run: set run.resume=true to go on from "
            f"{newest.name}, or choose another run.dir"
        )
    info = read_info(newest)
    other = decisive_differences(info.extra, config.model_dump(mode="json")) if run.resume == "auto" else []
    if other:
        more = f", and {len(other) - 1} more" if len(other) > 1 else ""
        raise UserError(
            f"{run.checkpoints_dir} holds checkpoints of another config ({other[0]}{more}), and run.resume=auto goes "
            "on with the same only: choose another run.dir or run.name, or set run.resume=true to go on with this one"
        )
    if info.step >= steps:
        raise UserError(f"{newest} has already done {info.step} of {steps} steps: raise train.steps to go on")
    return info.step


def check_placement(config: RLConfig, device: str) -> None:
    """Can the engines stand where `engine.placement` puts them, and be reached by the transport? Raises UserError."""
    engine, ranks = config.engine, config.parallel.world_size
    if engine.placement != "colocated" or device != "cuda":
        return
    if engine.servers * engine.tensor != ranks:
        if ranks % engine.tensor:
            mend = f"choose an engine.tensor that divides {ranks}"
        else:
            mend = f"{'name as many engine.urls as' if engine.urls else 'set engine.count to'} {ranks // engine.tensor}"
        raise UserError(
            f"engine.placement=colocated puts one engine rank on each of the trainer's {ranks} GPUs, but "
            f"{engine.servers} x engine.tensor={engine.tensor} ranks are configured: {mend}"
        )
    if config.sync.transport == "broadcast":
        raise UserError(
            "sync.transport=broadcast cannot reach colocated engines, because NCCL takes one rank per GPU only: set "
            "sync.transport=ipc, or disk, or engine.placement=disaggregated"
        )


def _check_trainer_devices(parallel: ParallelSection, engine: EngineSection | None, node: Node) -> None:
    if parallel.context > 1 and node.here and importlib.util.find_spec("transformer_engine") is None:
        raise UserError(
            f"parallel.context={parallel.context} needs transformer-engine, whose attention alone shares a sequence "
            "between ranks: install it on a machine with GPUs, or set parallel.context=1"
        )
    own = engine is not None and engine.placement == "disaggregated"
    started = _started_ranks(engine) if engine is not None and own else 0
    _check_gpus(parallel, parallel.world_size + started, node)


def _started_ranks(engine: EngineSection) -> int:
    """Engine ranks on this node; given servers have a place already."""
    return 0 if engine.urls else engine.count * engine.tensor


def _check_gpus(parallel: ParallelSection, needed: int, node: Node) -> None:
    if node.device(parallel) == "cuda" and node.gpus < needed:
        there = f"{node.gpus} are visible" if node.here else f"--gpus names {node.gpus}"
        raise UserError(
            f"this layout needs {needed} GPUs on the node, {there}: lower parallel.tensor, parallel.data, engine.count "
            "or engine.tensor, or set parallel.device=cpu to train on the CPU"
        )


def _check_machine(config: RLConfig, hf_config: dict[str, Any], node: Node) -> None:
    if node.here:
        _check_engine(config.engine)
        _check_disk(config.run.dir, hf_config, config.model.dtype)


def _check_engine(engine: EngineSection) -> None:
    if engine.urls:
        return
    if engine.python is not None and shutil.which(engine.python) is None:
        raise UserError(
            f"engine.python={engine.python} is not an executable file: name the bin/python of the engines' "
            "environment, or leave it out to use ours"
        )
    for port in range(engine.port, engine.port + engine.count) if engine.port else ():
        if port_in_use(engine.host, port):
            raise UserError(
                f"port {port} on {engine.host} is in use: end what listens there, or set engine.port=0 for free ones"
            )


def _check_players(config: RLConfig | EvaluateConfig) -> Gateway:
    """Metrics, their modules, prompt files, keys and prices; nobody is asked anything."""
    gateway = Gateway(llm_roles(config.simulators, config.reward), config.run.seed, budget=config.budget)
    configured_scorer(config.reward, config.simulators, gateway)
    user_simulator(config.simulators, gateway)
    return gateway


async def _check_reachable(gateway: Gateway, node: Node) -> None:
    try:
        if node.here:
            await gateway.check_reachable(REACH_TIMEOUT_S)
    finally:
        await gateway.close()


def _check_disk(run_dir: Path, hf_config: dict[str, Any], dtype: str) -> None:
    """Weights, fp32 master weights where they differ, and two Adam moments."""
    num_params = parameter_count(model_spec(hf_config))
    per_param = 4 + 8 + (2 if dtype == "bfloat16" else 0)
    needed = num_params * per_param * CHECKPOINT_COPIES
    existing = next(parent for parent in (run_dir, *run_dir.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{run_dir} has {free / 2**20:.0f} MB free, its checkpoints need {needed / 2**20:.0f} MB: free "
            "some space or choose another run.dir"
        )
