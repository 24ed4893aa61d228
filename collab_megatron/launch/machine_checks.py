"""Checks that the machine has what a config needs: GPUs, cores, disk space, transformer-engine."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from collab_megatron.config import RLConfig
from collab_megatron.config.sections import EngineSection, ParallelSection
from collab_megatron.errors import UserError
from collab_megatron.launch.node import Node, has_gpu_packages
from collab_megatron.launch.threads import usable_cores
from collab_megatron.model.spec import ModelSpec
from collab_megatron.model.tables import parameter_count

PROCESSES_PER_CORE = 32
"""More processes or threads on one core would not finish a step."""
CHECKPOINT_COPIES = 2
"""Disk space for saving: the checkpoint being written, next to the one it replaces."""


def check_placement(config: RLConfig, device: str) -> None:
    """Check that engine.placement fits the GPUs and the transport reaches the engines. Raises UserError."""
    engine, ranks = config.engine, config.parallel.world_size
    if engine.placement != "colocated" or device != "cuda":
        return
    if engine.servers * engine.tensor != ranks:
        if ranks % engine.tensor:
            remedy = f"choose an engine.tensor that divides {ranks}"
        else:
            servers = "name as many engine.urls as" if engine.urls else "set engine.count to"
            remedy = f"{servers} {ranks // engine.tensor}"
        raise UserError(
            f"engine.placement=colocated puts one engine rank on each of the trainer's {ranks} GPUs, but "
            f"{engine.servers} x engine.tensor={engine.tensor} ranks are configured: {remedy}"
        )
    if config.sync.transport == "broadcast":
        raise UserError(
            "sync.transport=broadcast cannot reach colocated engines, because NCCL takes one rank per GPU only: set "
            "sync.transport=ipc, or disk, or engine.placement=disaggregated"
        )


def check_trainer(parallel: ParallelSection, engine: EngineSection | None, node: Node) -> None:
    """Check GPUs, cores and transformer-engine for trainer ranks and engines on this node. Raises UserError."""
    started = 0 if engine is None else started_ranks(engine)
    if node.here:
        parallel.require_transformer_engine(importlib.util.find_spec("transformer_engine") is not None)
        if node.device(parallel) == "cpu" and not node.hosts and max(parallel.world_size, started) > most_processes():
            raise UserError(
                f"{parallel.world_size:,} trainer ranks and {started:,} engine ranks are too many for the "
                f"{usable_cores()} cores of this machine: lower parallel.data, engine.count or engine.tensor"
            )
        check_process_count("parallel.threads", parallel.threads)
        check_process_count("engine.threads", None if engine is None else engine.threads)
    own = engine is not None and engine.placement == "disaggregated"
    check_gpus(parallel, parallel.world_size + (started if own else 0), node)


def check_process_count(key: str, count: int | None) -> None:
    """Raise UserError where the cores of this machine cannot run so many processes or threads."""
    if count is not None and count > most_processes():
        raise UserError(f"{key}={count} are too many for the {usable_cores()} cores of this machine: lower it")


def most_processes() -> int:
    return PROCESSES_PER_CORE * usable_cores()


def started_ranks(engine: EngineSection) -> int:
    """Engine ranks that this node starts; 0 for engine.urls."""
    return 0 if engine.urls else engine.count * engine.tensor


def check_gpus(parallel: ParallelSection, needed: int, node: Node) -> None:
    """Check that the node has the GPUs, and this environment what uses them. Raises UserError.

    Of several nodes placement.py compares them, which knows what stays inside a node."""
    if node.device(parallel) == "cpu" or node.hosts:
        return
    if node.gpus < needed:
        there = f"{node.gpus} are visible" if node.here else f"--gpus names {node.gpus}"
        raise UserError(
            f"this layout needs {needed} GPUs on the node, {there}: lower parallel.tensor, parallel.data, engine.count "
            "or engine.tensor, or set parallel.device=cpu to train on the CPU"
        )
    if node.here and not has_gpu_packages():
        raise UserError(
            "parallel.device=cuda, but this environment has no GPU packages (a torch built for CUDA, and SGLang's "
            "kernels): build one with make install-gpu, or set parallel.device=cpu"
        )


def check_disk_space(run_dir: Path, spec: ModelSpec, dtype: str) -> None:
    """Check space for checkpoints: weights, fp32 master weights if they differ, and two Adam moments."""
    num_params = parameter_count(spec)
    per_param = 4 + 8 + (2 if dtype == "bfloat16" else 0)
    needed = num_params * per_param * CHECKPOINT_COPIES
    existing = next(parent for parent in (run_dir, *run_dir.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{run_dir} has {free / 2**20:.0f} MB free, its checkpoints need {needed / 2**20:.0f} MB: free "
            "some space or choose another run.dir"
        )
