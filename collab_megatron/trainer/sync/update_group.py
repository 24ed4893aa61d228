"""The process group between one sending rank of the trainer and all ranks of all servers."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from datetime import timedelta
from urllib.parse import urlsplit

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from collab_megatron.errors import RunError
from collab_megatron.trainer.actor.rendezvous import listening_store
from collab_megatron.trainer.sync.attempt import Attempt
from collab_megatron.trainer.sync.threads import in_background
from collab_megatron.wire.roster import EngineEntry

HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"


class UpdateGroup:
    """Rank 0 of the group is the sender. `close` releases every member that waits for the others."""

    def __init__(self, name: str, *, host: str, world_size: int, backend: str, timeout_s: float) -> None:
        """Opens the store through which the members find each other; `host` is this machine as the servers reach it."""
        self.name, self.host = name, host
        self.world_size, self.backend = world_size, backend
        self._timeout = timedelta(seconds=timeout_s)
        # a store of its own, so that closing it wakes every member that still waits for another
        self._store: dist.TCPStore | None = listening_store(host, 0, timeout=self._timeout)
        self.port = self._store.port
        self.group: dist.ProcessGroup | None = None

    def join(self, attempt: Attempt) -> None:
        """Join, and wait until all members have. Raises Abandoned, or RunError at the deadline."""
        joining = in_background(f"joining {self.name}", self._join)
        attempt.wait(joining.done, f"joining the update group of {self.world_size - 1} engine ranks")
        if error := joining.exception():
            raise RunError(f"the update group could not be made: {str(error).splitlines()[0]}") from error

    def _join(self) -> None:
        """torch has no public call for a second, independent world, so this does what the server does on its side
        (sglang/srt/utils/common.py, init_custom_process_group): same store prefix, same group name."""
        store = dist.TCPStore(self.host, self.port, is_master=False, timeout=self._timeout)
        with _watchdog_leaves_errors_to_us():
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
        if self._store is None:  # closed in the meantime
            self.close()

    def close(self) -> None:
        """Leave the group. Returns at once, although torch waits for collectives that are stuck."""
        group, self.group, self._store = self.group, None, None
        if group is not None:
            # an NCCL kernel that waits for a dead peer never ends by itself
            leave = c10d._abort_process_group if self.backend == "nccl" else dist.destroy_process_group
            in_background(f"leaving {self.name}", leave, group)


@contextlib.contextmanager
def _watchdog_leaves_errors_to_us() -> Iterator[None]:
    """NCCL groups made in the block do not end the process when a member dies: the sync gives that server up.

    By default torch's watchdog ends it at a member's death or at the group's deadline, which is also ours. A group
    reads the variable when it is made (torch 2.13, ProcessGroupNCCL.cpp; _abort_process_group asks for this value).
    The trainer's own groups keep their watchdog.
    """
    before = os.environ.get(HANDLING)
    os.environ[HANDLING] = "0"  # NoHandling
    try:
        yield
    finally:
        if before is None:
            del os.environ[HANDLING]
        else:
            os.environ[HANDLING] = before


def address_seen_by(members: Sequence[EngineEntry]) -> str:
    """This machine's address as the servers reach it: loopback where all of them are here."""
    hosts = [urlsplit(member.url).hostname or "127.0.0.1" for member in members]
    away = next((host for host in hosts if not socket.gethostbyname(host).startswith("127.")), None)
    if away is None:
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((away, 9))  # sends nothing: asks the kernel which interface leads there
        return str(probe.getsockname()[0])
