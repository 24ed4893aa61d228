"""Writer of megatron's `torch_dist` format inside the training process: at once, or later from a copy of the state.

Upstream's strategy writes in child processes with a multiprocessing manager: its first save waits 3-6 s for an
interpreter that imports torch again, and needs a `__main__` guard. Here megatron only plans the save; the tensors are
kept, and `write_tensors` writes the same files through torch.distributed.checkpoint, on any thread that has a process
group of its own.
Upstream: megatron/core/dist_checkpointing/serialization.py, strategies/torch.py (0.16.1 and 0.19.2, of which only what
both have is used).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import torch as upstream
from torch.distributed.checkpoint import CheckpointException

from collab_megatron.errors import RunError


class DeferredSave:
    """Megatron's `dist_checkpointing.save` up to the tensors: `tensors` has this rank's, ready for write_tensors.

    Megatron 0.16 writes the part that is not sharded to common.pt, 0.19 as a pickle among the tensors. Here it is
    common.pt with both, so that each version reads the other's checkpoints and no tensor file holds a pickle.
    before: called on every rank once rank 0 has written common.pt, or failed; there the other ranks learn of that.
    copy: copy the tensors to host memory, so that training can go on. An error after `before` is kept in `failure`:
    raised here, it would leave the other ranks in the barrier.
    """

    def __init__(self, before: Callable[[], None], *, copy: bool) -> None:
        self._before, self._copy = before, copy
        self.tensors: dict[str, Any] = {}
        self.failure: Exception | None = None

    def save(self, tree: dict[str, Any], folder: Path) -> None:
        """Collective."""
        sharded, common = save_preprocess(tree)
        is_main = dist.get_rank() == 0
        if is_main:
            torch.save(common, folder / "common.pt")
        self._before()
        try:
            flat, _, _ = upstream._replace_state_dict_keys_with_sharded_keys(sharded, True)
            if self._copy:
                _copy_to_host([shard for shards in flat.values() for shard in shards])
            self.tensors = upstream.mcore_to_pyt_state_dict(flat, False)
        except Exception as error:  # noqa: BLE001  (see above)
            self.failure = error
        try:
            if is_main:
                save_config(CheckpointingConfig("torch_dist", 1), str(folder))
        except Exception as error:  # noqa: BLE001  (see above)
            self.failure = self.failure or error
        dist.barrier()


def write_tensors(tensors: dict[str, Any], folder: Path, group: dist.ProcessGroup) -> None:
    """Write and force to disk. Collective over `group`, which no other thread may use at the same time.

    Raises on every rank the error of the first rank that cannot write.
    """
    try:
        dcp.save(
            tensors,
            storage_writer=dcp.FileSystemWriter(folder, thread_count=1),
            planner=upstream.MCoreSavePlanner(flatten_state_dict=False, dedup_replicated_tensors=False),
            process_group=group,
        )
    except CheckpointException as error:  # a BaseException: rank -> (exception, traceback)
        reason = next(iter(error.failures.values()))[0]
        if isinstance(reason, Exception):
            raise reason from error
        raise RunError(f"a rank was interrupted while it wrote: {type(reason).__name__}") from error


def _copy_to_host(shards: list[Any]) -> None:
    """Replace the data of megatron's ShardedTensors by host copies, in place; pinned and asynchronous from a GPU."""
    on_gpu = False
    for shard in shards:
        live = shard.data.detach()
        on_gpu = on_gpu or live.is_cuda
        host = torch.empty(live.shape, dtype=live.dtype, device="cpu", pin_memory=live.is_cuda)
        shard.data = host.copy_(live, non_blocking=live.is_cuda)
    if on_gpu:
        torch.cuda.synchronize()
