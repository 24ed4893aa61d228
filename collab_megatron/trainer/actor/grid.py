"""Rank grid: this rank's position and process groups in tensor, pipeline, context, expert and data parallelism.

Set once per process. Ranks are in megatron's default order: tensor parallelism is innermost, so that its heavy
collectives stay on neighboring devices; pipeline stages are outermost. An expert is never cut (expert tensor
parallelism is 1): along the ranks of a pipeline stage come the expert-parallel shards, then their copies.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from collab_megatron.config.sections import ParallelSection
from collab_megatron.errors import RunError, UserError
from collab_megatron.trainer.actor.backend import Backend, choose_backend
from collab_megatron.trainer.actor.rendezvous import ranks_store

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankGrid:
    """This process's position among the trainer ranks, and its process groups."""

    rank: int
    world_size: int
    parallel: ParallelSection
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    ep_rank: int
    ep_size: int
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    dp_cp_group: dist.ProcessGroup  # all ranks that hold the same dense shard
    ep_group: dist.ProcessGroup
    cpu_group: dist.ProcessGroup  # gloo over all ranks: for small messages (agreement.py), apart from NCCL
    pp_cpu_group: dist.ProcessGroup  # gloo over the pipeline stages
    backend: Backend
    sequence_parallel: bool
    timeout_s: float  # deadline of every collective

    @property
    def device(self) -> torch.device:
        return self.backend.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes log-probs and losses."""
        return self.pp_rank == self.pp_size - 1

    @property
    def place(self) -> str:
        """For messages: "tp 0, pp 1, dp 0", without axes of one rank."""
        axes = {"tp": self.tp_size, "pp": self.pp_size, "cp": self.cp_size, "ep": self.ep_size, "dp": self.dp_size}
        return ", ".join(f"{axis} {getattr(self, axis + '_rank')}" for axis, size in axes.items() if size > 1)

    def sum_over_context(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor on `device` over the ranks that share its rows, in place. Collective over them."""
        if self.cp_size > 1:
            dist.all_reduce(tensor, group=self.cp_group)
        return tensor

    @property
    def pad_multiple(self) -> int:
        """Row lengths must be multiples of this (batching.split_by_tokens).

        Sequence parallelism cuts a row into one part per tensor-parallel rank, context parallelism into two per rank.
        """
        sequence = self.tp_size if self.sequence_parallel else 1
        return sequence * (2 * self.cp_size if self.cp_size > 1 else 1)


_grid: RankGrid | None = None


def grid() -> RankGrid:
    """The grid of this process. Raises RuntimeError before init_grid."""
    if _grid is None:
        raise RuntimeError("init_grid has not been called in this process")
    return _grid


def init_grid(parallel: ParallelSection, seed: int, *, waits_s: float = 0.0) -> RankGrid:
    """Join the process groups and seed. RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are in the environment.

    A single rank needs none of them. Waits at most `collective_timeout_s` for the other ranks; in collectives of the
    model, `waits_s` longer: a rank may come that late, because it waits for an engine. Raises UserError if WORLD_SIZE
    does not fit the layout or the layout cannot run here, RunError if the other ranks do not come in time.
    """
    global _grid
    if _grid is not None:
        raise RuntimeError("init_grid was called twice in one process")
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != parallel.world_size:
        raise UserError(
            f"{world_size} ranks were started, but parallel.tensor={parallel.tensor} * pipeline={parallel.pipeline} * "
            f"context={parallel.context} * data={parallel.data} is {parallel.world_size}"
        )
    backend = choose_backend(parallel.device, local_rank)
    parallel.require_transformer_engine(backend.transformer_engine)
    _set_threads(backend)
    timeout = timedelta(seconds=parallel.collective_timeout_s)
    # NCCL's watchdog ends the process at this deadline, before the late rank could give the engine up
    of_model = timeout + timedelta(seconds=waits_s)
    if not dist.is_initialized():  # else close_grid(leave_world=False) was called before
        _join_world(backend, rank, world_size, timeout, of_model)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.interleave if parallel.interleave > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1,
        # an int by megatron's annotation, but it only makes a timedelta of it
        distributed_timeout_minutes=of_model.total_seconds() / 60,
    )
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    pp_group = parallel_state.get_pipeline_model_parallel_group()
    _grid = RankGrid(
        rank=rank,
        world_size=world_size,
        parallel=parallel,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel.tensor,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel.pipeline,
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel.context,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel.data,
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_size=parallel.expert,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=pp_group,
        cp_group=parallel_state.get_context_parallel_group(),
        dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        ep_group=parallel_state.get_expert_model_parallel_group(),
        cpu_group=dist.new_group(backend="gloo", timeout=timeout),
        pp_cpu_group=_every_group_on_cpu(pp_group, world_size, timeout),
        backend=backend,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor > 1,
        timeout_s=parallel.collective_timeout_s,
    )
    logger.info("layout: rank %d of %d, %s", rank, world_size, _grid.place or "alone")
    return _grid


def _join_world(backend: Backend, rank: int, world_size: int, timeout: timedelta, of_model: timedelta) -> None:
    try:
        store = ranks_store(rank, world_size, timeout)
        dist.init_process_group(backend.process_group, timeout=of_model, rank=rank, world_size=world_size, store=store)
    except (dist.DistError, RuntimeError, ValueError, OSError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RunError(f"rank {rank} of {world_size} could not join the others at {address}: {error}") from error


def close_grid(*, leave_world: bool = True) -> None:
    """Leave the process groups, if there are any. leave_world: False if the same ranks join another layout next."""
    global _grid
    if _grid is not None:
        parallel_state.destroy_model_parallel()
        if leave_world:
            dist.destroy_process_group()
        _grid = None


def _every_group_on_cpu(group: dist.ProcessGroup, world_size: int, timeout: timedelta) -> dist.ProcessGroup:
    """The same ranks over gloo. Collective over all ranks, because torch needs every rank in every new_group."""
    every: list[Any] = [None] * world_size
    dist.all_gather_object(every, tuple(dist.get_process_group_ranks(group)))
    mine = None
    for ranks in sorted(set(every)):
        made = dist.new_group(list(ranks), backend="gloo", timeout=timeout)
        if dist.get_rank() in ranks:
            mine = made
    assert mine is not None
    return mine


def _set_threads(backend: Backend) -> None:
    """Divide a machine's cores between its CPU ranks, unless the user has set OMP_NUM_THREADS."""
    if backend.name == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
