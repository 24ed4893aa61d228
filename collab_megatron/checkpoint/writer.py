"""A save strategy that writes in the training process itself, and says on every rank what went wrong on any.

Upstream's torch_dist strategy hands its buffers to processes, and its results queue to a multiprocessing manager that
it spawns: the first save waits 3-6 s for an interpreter that imports torch again, and needs a `__main__` guard. Nothing
here is asynchronous, so the same plan goes through torch.distributed.checkpoint.save with its own FileSystemWriter: the
same files, no process. Upstream: megatron/core/dist_checkpointing/strategies/torch.py (0.16.1).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.strategies import torch as upstream

# upstream warns of an "old incomplete checkpoint" when another rank has begun to write into the folder that is new
logging.getLogger("megatron.core.dist_checkpointing.serialization").setLevel(logging.ERROR)


class InProcessSave(upstream.TorchDistSaveShardedStrategy):
    """Megatron's `torch_dist` format, version 1.

    `before` runs on every rank ahead of the collective part (rank 0 has written its common part by then or has failed:
    this is where the others hear of it); `after` runs once the tensors are written.
    """

    def __init__(self, group: dist.ProcessGroup, before: Callable[[], None], after: Callable[[], None]) -> None:
        super().__init__("torch_dist", 1, keep_only_main_replica=True, thread_count=1)
        self._group, self._before, self._after = group, before, after

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        """Collective. Raises torch's CheckpointException on every rank when any rank cannot write."""
        self._before()
        flat, _, _ = upstream._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        dcp.save(
            upstream.mcore_to_pyt_state_dict(flat, False),
            storage_writer=dcp.FileSystemWriter(checkpoint_dir, thread_count=1),
            planner=upstream.MCoreSavePlanner(flatten_state_dict=False, dedup_replicated_tensors=False),
            process_group=self._group,
        )
        self._after()
