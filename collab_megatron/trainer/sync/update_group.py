"""The process group between one sending rank of the trainer and all ranks of all servers."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from collab_megatron.errors import RunError
from collab_megatron.trainer.actor.rendezvous import listening_store
from collab_megatron.trainer.sync.attempt import Board
from collab_megatron.trainer.sync.threads import in_background


class UpdateGroup:
    """Rank 0 of the group is the sender. Whoever waits for the others is released by `close`, on whichever side."""

    def __init__(self, name: str, *, host: str, world_size: int, backend: str, timeout_s: float) -> None:
        """Opens the store through which the members find each other; `host` is this machine as the servers see it."""
        self.name, self.host = name, host
        self.world_size, self.backend = world_size, backend
        self._timeout = timedelta(seconds=timeout_s)
        # a store of its own, so that closing it wakes every member that still waits for another
        self._store: dist.TCPStore | None = listening_store(host, 0, timeout=self._timeout)
        self.port = self._store.port
        self.group: dist.ProcessGroup | None = None

    def join(self, board: Board) -> None:
        """Until all members have joined. Raises Abandoned, or RunError at the deadline."""
        joining = in_background(f"joining {self.name}", self._join)
        board.wait(joining.done, f"joining the update group of {self.world_size - 1} engine ranks")
        if error := joining.exception():
            raise RunError(f"the update group could not be made: {str(error).splitlines()[0]}") from error

    def _join(self) -> None:
        """torch has no public way to a second, independent world, so this does what the server does on its side
        (sglang/srt/utils/common.py, init_custom_process_group): same store prefix, same group name."""
        store = dist.TCPStore(self.host, self.port, is_master=False, timeout=self._timeout)
        group, _ = c10d._new_process_group_helper(
            self.world_size,
            0,
            [],
            dist.Backend(self.backend),
            dist.PrefixStore(self.name, store),
            group_name=c10d.GroupName(self.name),
            timeout=self._timeout,
        )
        c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(self.world_size)}
        self.group = group
        if self._store is None:  # closed meanwhile
            self.close()

    def close(self) -> None:
        """Leave the group. Returns at once: torch waits for collectives that are stuck, and we do not wait with it."""
        group, self.group, self._store = self.group, None, None
        if group is not None:
            # a kernel of NCCL that waits for a dead peer never ends by itself
            leave = c10d._abort_process_group if self.backend == "nccl" else dist.destroy_process_group
            in_background(f"leaving {self.name}", leave, group)
