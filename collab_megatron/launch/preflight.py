"""Every check that can be made before a process is started: a user's mistake ends in seconds, with one sentence."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from collab_megatron.config import BuildDatasetConfig, EvaluateConfig, RLConfig, SFTConfig, kept_config
from collab_megatron.config.entry import llm_roles
from collab_megatron.config.sections import EngineSection, ParallelSection
from collab_megatron.data.chat import ChatTemplate, InexactTemplate, load_tokenizer
from collab_megatron.data.fit import fitting_tasks, max_context_tokens
from collab_megatron.data.parquet import read_task_files
from collab_megatron.data.sft_rows import read_sft_rows
from collab_megatron.data.splits import shared_tasks
from collab_megatron.data_engine.problems import read_problems
from collab_megatron.data_engine.worker import make_players
from collab_megatron.engine.server_args import engine_command
from collab_megatron.errors import UserError, masked
from collab_megatron.json_lines import read_rows
from collab_megatron.launch.cautions import warn_of_config, warn_of_memory, warn_of_prompts
from collab_megatron.launch.cost import build_calls, evaluation_calls, evaluations, lengths_of, step_calls
from collab_megatron.launch.engine_checks import check_context_length, check_engine, check_flags
from collab_megatron.launch.node import Node, this_node
from collab_megatron.launch.places import (
    check_file,
    check_folder,
    check_journal_file,
    check_prompt_files,
    check_run,
)
from collab_megatron.launch.plan import build_plan, evaluate_plan, rl_plan, sft_plan
from collab_megatron.launch.threads import usable_cores
from collab_megatron.model.inventory import check_inventory, tensor_shapes
from collab_megatron.model.layout import check_layout, read_hf_config
from collab_megatron.model.source import resolve_model_folder
from collab_megatron.model.spec import ModelSpec, model_spec
from collab_megatron.model.tables import parameter_count
from collab_megatron.rollout.llm import Gateway, user_simulator
from collab_megatron.rollout.llm.health import SimulatorHealth
from collab_megatron.rollout.rewards import configured_scorer
from collab_megatron.types import Task
from collab_megatron.wire.checkpoints import MARKER, named_checkpoint, newest_complete, read_info
from collab_megatron.wire.provenance import decisive_differences
from collab_megatron.wire.unfinished import METRICS_FILE, Start, is_exported, rl_lacks, sft_lacks

REACH_TIMEOUT_S = 5.0
DEFAULT_PORT = 30000  # SGLang's; stands for the free one that is found at the start
RANKS_PER_CORE = 32
"""More ranks on one core would not come to the end of a step."""
CHECKPOINT_COPIES = 2
"""Room that saving needs: the checkpoint being written beside the one it replaces."""

Report = Callable[[str], None]
C = TypeVar("C", RLConfig, SFTConfig)


def print_at_once(text: str) -> None:
    print(masked(text), flush=True)


@dataclass(frozen=True)
class RLStart(Start):
    """Of a run with engines and a driver."""

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
    check_context_length(config.engine, model.spec)
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
    start = RLStart(*_check_run(config, rl_lacks, here), max_context_tokens=room, usable_prompts=len(train))
    if start.is_done:
        return start
    if here.here:
        check_journal_file(config.journal, config.run.dir / "journal" / f"{config.run.name}.sqlite")
    _check_trainer_devices(config.parallel, config.engine, here)
    _check_machine(config, model.hf_config, here)
    asyncio.run(_check_reachable(gateway, here))
    return start


def check_sft(
    config: SFTConfig, *, dry_run: bool = False, node: Node | None = None, report: Report = print_at_once
) -> Start:
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
    start = Start(*_check_run(config, sft_lacks, here))
    if start.is_done:
        return start
    _check_trainer_devices(config.parallel, None, here)
    if here.here:
        _check_disk(config.run.dir, model.hf_config, config.model.dtype)
    target = config.export_hf
    own = start.lacks is not None and is_exported(config)
    if target is not None and here.here:
        check_folder("export_hf", target)
        if not own and target.exists() and any(target.iterdir()):
            raise UserError(f"export_hf {target} exists and is not empty: choose another folder or remove it")
    return start


def check_evaluate(
    config: EvaluateConfig, *, dry_run: bool = False, node: Node | None = None, report: Report = print_at_once
) -> int:
    """All checks of an evaluation, as `check_rl`; returns the context length. Raises UserError."""
    here = node or this_node()
    one = ParallelSection(device=config.parallel.device)
    model = _check_model(config.model.path, one, config.rollout.inexact_template, weights=not dry_run)
    check_context_length(config.engine, model.spec)
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
        check_run(config.run)
        output = config.output or config.run.evaluations_dir / "model.json"
        check_file("output", output)
        journal = config.journal.path
        check_folder("journal.path", config.run.dir / "journal" if journal is None else journal.parent)
        check_engine(config.engine)
        _check_flags(config, here)
    asyncio.run(_check_reachable(gateway, here))
    return room


def check_build(config: BuildDatasetConfig, *, report: Report = print_at_once) -> None:
    """All checks of tools/build_dataset.py, as `check_rl`, but for those of its output folder. Raises UserError."""
    check_folder("output", config.output)
    check_journal_file(config.journal, config.output / "journal.sqlite")
    check_prompt_files(config)
    if config.processes > RANKS_PER_CORE * usable_cores():
        raise UserError(f"processes={config.processes} are too many for {usable_cores()} cores: lower it")
    tasks = [problem.task for problem in read_problems(config.problems, config.num_conversations)]
    gateway = Gateway(llm_roles(config.simulators, config.reward), config.seed, budget=config.budget)
    gateway.check_models()
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


def _check_run(config: C, lacks: Callable[[C], Sequence[str]], node: Node) -> tuple[int, tuple[str, ...] | None]:
    """The first step to run; where all are done, what is missing after them (printed in a line).

    A fresh run must not write over an earlier one's checkpoints, nor go on with another's. `lacks` looks for what is
    missing. Raises UserError for a damaged record too."""
    run, steps = config.run, config.train.steps
    if node.here:
        check_run(run)
    newest = newest_complete(run.checkpoints_dir)
    if newest is None:
        if run.init_from is not None:
            try:
                named_checkpoint(run.init_from)
            except UserError as error:
                raise UserError(f"run.init_from: {error}") from None
        return 0, None
    if not run.resume:
        raise UserError(
            f"{run.checkpoints_dir} holds checkpoints of an earlier run: set run.resume=true to go on from "
            f"{newest.name}, or choose another run.dir"
        )
    info = read_info(newest)
    other = decisive_differences(info.extra, kept_config(config)) if run.resume == "auto" else []
    if other:
        more = f", and {len(other) - 1} more" if len(other) > 1 else ""
        raise UserError(
            f"{run.checkpoints_dir} holds checkpoints of another config ({other[0]}{more}), and run.resume=auto goes "
            "on with the same only: choose another run.dir or run.name, or set run.resume=true to go on with this one"
        )
    if info.step > steps:
        raise UserError(f"{newest} has already done {info.step} of {steps} steps: raise train.steps to go on")
    for record in (run.tensorboard_dir / METRICS_FILE, run.evaluations_file):
        read_rows(record, numbers=("step",))
    if info.step < steps:
        return info.step, None
    missing = tuple(lacks(config))
    what = f"what is missing is made: {', '.join(missing)}" if missing else "nothing is left to do"
    print(f"all {steps} steps are done; {what}", flush=True)
    return info.step, missing


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
    started = 0 if engine is None else _started_ranks(engine)
    most = RANKS_PER_CORE * usable_cores()
    if node.here and node.device(parallel) == "cpu" and max(parallel.world_size, started) > most:
        raise UserError(
            f"{parallel.world_size:,} trainer ranks and {started:,} engine ranks are too many for the "
            f"{usable_cores()} cores of this machine: lower parallel.data, engine.count or engine.tensor"
        )
    for key, threads in (
        ("parallel.threads", parallel.threads),
        ("engine.threads", None if engine is None else engine.threads),
    ):
        if node.here and threads is not None and threads > most:
            raise UserError(f"{key}={threads} are too many for the {usable_cores()} cores of this machine: lower it")
    own = engine is not None and engine.placement == "disaggregated"
    _check_gpus(parallel, parallel.world_size + (started if own else 0), node)


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
        check_engine(config.engine)
        if config.sync.disk_dir is not None:
            check_folder("sync.disk_dir", config.sync.disk_dir)
        _check_disk(config.run.dir, hf_config, config.model.dtype)
        _check_flags(config, node)


def _check_flags(config: RLConfig | EvaluateConfig, node: Node) -> None:
    """Last of the engine's checks: it imports SGLang, some seconds, where there is a flag that only SGLang knows."""
    if config.engine.extra_args and not config.engine.urls:
        command = engine_command(
            config.engine,
            model_path=config.model.path,
            dtype=config.model.dtype,
            device=node.device(config.parallel),
            port=config.engine.port or DEFAULT_PORT,
            seed=config.run.seed,
        )
        check_flags(command)


def _check_players(config: RLConfig | EvaluateConfig) -> Gateway:
    """Metrics, their modules, prompt files, keys and prices; nobody is asked anything."""
    check_prompt_files(config)
    SimulatorHealth(config.simulators.health)
    gateway = Gateway(llm_roles(config.simulators, config.reward), config.run.seed, budget=config.budget)
    gateway.check_models()
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
