"""Every check that can be made before a process is started: a user's mistake ends in seconds, with one sentence."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collab_megatron.checkpoint.folders import newest_complete, read_info
from collab_megatron.cluster.processes import port_in_use
from collab_megatron.config import EvaluateConfig, RLConfig, SFTConfig
from collab_megatron.config.entry import llm_roles
from collab_megatron.config.sections import EngineSection, ParallelSection, RunSection
from collab_megatron.convert.layout import check_layout, read_hf_config
from collab_megatron.convert.source import resolve_model_folder
from collab_megatron.convert.spec import model_spec
from collab_megatron.convert.tables import parameter_count
from collab_megatron.data.chat import ChatTemplate, InexactTemplate, load_tokenizer
from collab_megatron.data.fit import fitting_tasks
from collab_megatron.data.parquet import read_conversation_files, read_task_files
from collab_megatron.data.splits import shared_tasks
from collab_megatron.errors import UserError
from collab_megatron.rewards import configured_scorer
from collab_megatron.simulators import Gateway

REACH_TIMEOUT_S = 5.0
CHECKPOINT_COPIES = 2
"""Room that saving needs: the checkpoint being written beside the one it replaces."""


@dataclass(frozen=True)
class RLStart:
    """What the checks found out on the way."""

    first_step: int
    max_context_tokens: int
    usable_prompts: int  # training tasks whose prompt fits


def device_of(parallel: ParallelSection) -> str:
    """cpu or cuda, without importing torch into the launcher."""
    if parallel.device != "auto":
        return parallel.device
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


def check_rl(config: RLConfig) -> RLStart:
    """All checks of train_rl. Raises UserError."""
    hf_config = _check_model(config.model.path, config.parallel, config.rollout.inexact_template)
    first_step = _check_run(config.run, config.train.steps)
    room = max_context_tokens(hf_config, config.engine)
    usable_prompts = _check_prompts(config, room)
    check_placement(config)
    _check_trainer_devices(config.parallel, config.engine)
    _check_engine(config.engine)
    _check_disk(config.run.dir, hf_config, config.model.dtype)
    asyncio.run(_check_simulators(config))
    return RLStart(first_step=first_step, max_context_tokens=room, usable_prompts=usable_prompts)


def check_sft(config: SFTConfig) -> None:
    """All checks of train_sft. Raises UserError."""
    hf_config = _check_model(config.model.path, config.parallel, "as_sampled")  # chats are rendered, none grows
    _check_run(config.run, config.train.steps)
    read_conversation_files(config.data.train_files)
    read_conversation_files(config.data.validation_files)
    _check_trainer_devices(config.parallel, None)
    _check_disk(config.run.dir, hf_config, config.model.dtype)
    target = config.export_hf
    if target is not None and target.exists() and any(target.iterdir()):
        raise UserError(f"export_hf {target} exists and is not empty: choose another folder or remove it")


def check_evaluate(config: EvaluateConfig) -> int:
    """All checks of an evaluation; returns the context length. Raises UserError."""
    hf_config = _check_model(
        config.model.path, ParallelSection(device=config.parallel.device), config.rollout.inexact_template
    )
    read_task_files(config.data.validation_files)
    _check_gpus(config.parallel, _started_ranks(config.engine))
    _check_engine(config.engine)
    asyncio.run(_check_simulators(config))
    return max_context_tokens(hf_config, config.engine)


def _check_prompts(config: RLConfig, max_context_tokens: int) -> int:
    """Training prompts that fit; prints what is left out. Raises UserError where over half of a set is too long."""
    chat = ChatTemplate(load_tokenizer(resolve_model_folder(config.model.path)))
    usable, wishes = {}, []
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
        usable[files] = len(fit.kept)
        wishes.append([task.single_turn_prompt for task in tasks])
    if shared := shared_tasks(*wishes):
        print(
            f"warning: {len(shared):,} held-out tasks are trained on too, so held-out figures will be too good: "
            "tools/prepare_dataset.py keeps the two apart",
            flush=True,
        )
    return usable[config.data.train_files]


def max_context_tokens(hf_config: dict[str, Any], engine: EngineSection) -> int:
    """Tokens that prompt and reply may take together in the engine."""
    limits = [limit for limit in (engine.context_length, hf_config.get("max_position_embeddings")) if limit]
    return min(limits) if limits else 2**31 - 1


def _check_model(path: str, parallel: ParallelSection, inexact_template: InexactTemplate) -> dict[str, Any]:
    folder = resolve_model_folder(path)
    hf_config = read_hf_config(folder)
    check_layout(hf_config, parallel)
    ChatTemplate(load_tokenizer(folder)).check_growth(inexact_template)
    return hf_config


def _check_run(run: RunSection, steps: int) -> int:
    """The first step to run. A fresh run must not write over an earlier one's checkpoints."""
    newest = newest_complete(run.checkpoints_dir)
    if newest is None:
        return 0
    if not run.resume:
        raise UserError(
            f"{run.checkpoints_dir} holds checkpoints of an earlier run: set run.resume=true to go on from "
            f"{newest.name}, or choose another run.dir"
        )
    done = read_info(newest).step
    if done >= steps:
        raise UserError(f"{newest} has already done {done} of {steps} steps: raise train.steps to go on")
    return done


def check_placement(config: RLConfig) -> None:
    """Can the engines stand where `engine.placement` puts them, and be reached by the transport? Raises UserError."""
    engine, ranks = config.engine, config.parallel.world_size
    if engine.placement != "colocated" or device_of(config.parallel) != "cuda":
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


def visible_gpus() -> list[str]:
    """Ids of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES wants them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [number for number in visible.split(",") if number]
    return [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def _check_trainer_devices(parallel: ParallelSection, engine: EngineSection | None) -> None:
    if parallel.context > 1 and importlib.util.find_spec("transformer_engine") is None:
        raise UserError(
            f"parallel.context={parallel.context} needs transformer-engine, whose attention alone shares a sequence "
            "between ranks: install it on a machine with GPUs, or set parallel.context=1"
        )
    own = engine is not None and engine.placement == "disaggregated"
    _check_gpus(parallel, parallel.world_size + (_started_ranks(engine) if engine is not None and own else 0))


def _started_ranks(engine: EngineSection) -> int:
    """Engine ranks on this node; given servers have a place already."""
    return 0 if engine.urls else engine.count * engine.tensor


def _check_gpus(parallel: ParallelSection, needed: int) -> None:
    if device_of(parallel) == "cuda" and len(visible_gpus()) < needed:
        raise UserError(
            f"this layout needs {needed} GPUs on the node, {len(visible_gpus())} are visible: lower parallel.tensor, "
            "parallel.data, engine.count or engine.tensor"
        )


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


async def _check_simulators(config: RLConfig | EvaluateConfig) -> None:
    gateway = Gateway(llm_roles(config.simulators), config.run.seed)  # a missing key is found here
    try:
        configured_scorer(config.reward, config.simulators, gateway)
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
