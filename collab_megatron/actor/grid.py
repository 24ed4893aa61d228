"""The rank grid: which rank is which tensor-parallel and data-parallel rank, and their process groups. Set once.

Ranks are laid out with tensor parallelism innermost (megatron's default order), so that its heavy collectives stay on
neighbouring devices.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from collab_megatron.actor.backend import Backend, choose_backend
from collab_megatron.config.sections import ParallelSection
from collab_megatron.errors import RunError, UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankGrid:
    """This process's place among the trainer ranks."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    dp_rank: int
    dp_size: int
    tp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    cpu_group: dist.ProcessGroup  # gloo over all ranks: small messages and agreements, never in NCCL's way
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
    def pad_multiple(self) -> int:
        """Padded sequence lengths must be multiples of this (batching.split_by_tokens)."""
        return self.tp_size if self.sequence_parallel else 1


_grid: RankGrid | None = None


def grid() -> RankGrid:
    """The grid in force. Raises RuntimeError before init_grid."""
    if _grid is None:
        raise RuntimeError("init_grid has not been called in this process")
    return _grid


def init_grid(parallel: ParallelSection, seed: int) -> RankGrid:
    """Join the process groups (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT from the environment) and seed.

    A single rank needs no environment at all. Waits at most `collective_timeout_s` for the other ranks.
    Raises UserError if WORLD_SIZE is not tensor * data, RunError if the other ranks do not come in time.
    """
    global _grid
    if _grid is not None:
        raise RuntimeError("init_grid was called twice in one process")
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != parallel.world_size:
        raise UserError(
            f"{world_size} ranks were started, but parallel.tensor={parallel.tensor} times "
            f"parallel.data={parallel.data} is {parallel.world_size}"
        )
    backend = choose_backend(parallel.device, local_rank)
    _set_threads(backend)
    timeout = timedelta(seconds=parallel.collective_timeout_s)
    where: dict[str, Any] = {"rank": rank, "world_size": world_size}
    if world_size == 1 and "MASTER_ADDR" not in os.environ:
        where["store"] = dist.HashStore()  # no port to fight over
    try:
        dist.init_process_group(backend.process_group, timeout=timeout, **where)
    except (dist.DistError, RuntimeError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RunError(f"rank {rank} of {world_size} could not join the others at {address}: {error}") from error
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        # megatron types it int, but only ever builds a timedelta of it
        distributed_timeout_minutes=parallel.collective_timeout_s / 60,
    )
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    _grid = RankGrid(
        rank=rank,
        world_size=world_size,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel.tensor,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel.data,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        cpu_group=dist.new_group(backend="gloo", timeout=timeout),
        backend=backend,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor > 1,
        timeout_s=parallel.collective_timeout_s,
    )
    logger.info("rank %d of %d: tp rank %d, dp rank %d", rank, world_size, _grid.tp_rank, _grid.dp_rank)
    return _grid


def close_grid() -> None:
    """Leave the process groups; a no-op where there is none."""
    global _grid
    if _grid is not None:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        _grid = None


def barrier(rank_grid: RankGrid) -> None:
    """Wait for every rank, at most the grid's deadline. Raises RunError naming this rank when one does not come."""
    try:
        dist.monitored_barrier(rank_grid.cpu_group, timeout=timedelta(seconds=rank_grid.timeout_s))
    except RuntimeError as error:
        raise RunError(f"rank {rank_grid.rank}: {error}") from error


def agree(rank_grid: RankGrid, failure: str | None) -> list[str]:
    """Every rank says what failed on it (None: nothing) and hears of all failures, in rank order. Collective."""
    said: list[str | None] = [None] * rank_grid.world_size
    dist.all_gather_object(said, failure, group=rank_grid.cpu_group)
    return [f"rank {rank}: {text}" for rank, text in enumerate(said) if text is not None]


@contextlib.contextmanager
def phase(rank_grid: RankGrid, name: str) -> Iterator[None]:
    """Name the phase and this rank where a collective fails because a peer died or missed the deadline.

    Raises RunError for those; anything else passes through as it is.
    """
    try:
        yield
    except RuntimeError as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        # gloo raises plain RuntimeErrors that only their source path gives away
        if not isinstance(error, dist.DistError) and "gloo" not in first_line:
            raise
        raise RunError(
            f"rank {rank_grid.rank} (tp {rank_grid.tp_rank}, dp {rank_grid.dp_rank}) in {name}: a peer died or did not "
            f"answer within {rank_grid.timeout_s:g} s; its own log says why ({first_line})"
        ) from error


def _set_threads(backend: Backend) -> None:
    """CPU ranks of one machine share its cores; OMP_NUM_THREADS, where set, is the user's own choice."""
    if backend.name == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
