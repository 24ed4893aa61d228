"""The process group between the trainer's rank 0 and all ranks of one engine."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


def join_as_sender(
    *, address: str, port: int, world_size: int, group_name: str, backend: str, timeout_s: float
) -> dist.ProcessGroup:
    """Join as rank 0; blocks until the engine's ranks 1 .. world_size-1 have joined, at most `timeout_s`.

    torch has no public way to a second, independent world, so this does what the engine does on its side
    (sglang/srt/utils/common.py, init_custom_process_group): same store prefix, same group name.
    """
    timeout = timedelta(seconds=timeout_s)
    rendezvous = dist.rendezvous(f"tcp://{address}:{port}", 0, world_size, timeout=timeout)
    store, _, _ = next(rendezvous)
    store.set_timeout(timeout)
    group, _ = c10d._new_process_group_helper(
        world_size,
        0,
        [],
        dist.Backend(backend),
        dist.PrefixStore(group_name, store),
        group_name=c10d.GroupName(group_name),
        timeout=timeout,
    )
    c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
    return group
