"""Transport `ipc`: the servers load a bucket from memory that the trainer shares with them.

On GPUs: CUDA IPC handles, from the trainer rank that has the same GPU as the engine rank (`placement: colocated`).
On CPU: shared memory of one machine, one copy for all engine ranks. Handles are what torch.multiprocessing pickles, one
for every engine rank: each counts as one reader, and memory that was read more often than it was pickled is unlinked
under the trainer's feet. The bucket's description is sglang's (weight_updater.py,
`_update_weights_from_flattened_bucket`), made of plain namespaces, so that the trainer needs no sglang.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from collab_megatron.engine.control import EngineControl
from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.convert.buckets import Bucket
from collab_megatron.trainer.sync.attempt import Attempt
from collab_megatron.trainer.sync.bucket_transport import BucketTransport, is_stage_sender
from collab_megatron.trainer.sync.servers import SyncServers
from collab_megatron.wire.roster import EngineEntry

DEVICE_ARGUMENT = 6
"""Of torch.multiprocessing.reductions.rebuild_cuda_tensor: the device; sglang takes its UUID there, since the two
processes may count GPUs differently (sglang/srt/utils/patch_torch.py)."""


class IpcTransport(BucketTransport):
    """Handles go through the attempt's store to rank 0, which sends them to the servers; nothing is kept from sync to
    sync."""

    unpacked = False
    one_at_a_time = False

    def __init__(self, actor: Actor, servers: SyncServers | None, bucket_bytes: int) -> None:
        super().__init__(actor, servers, bucket_bytes)
        self._on_cpu = self._grid.device.type == "cpu"
        # on GPUs every rank sends to the engine rank on its own GPU, which holds the layers of all stages
        self.sends = is_stage_sender(self._grid) if self._on_cpu else True
        self.every_stage = not self._on_cpu and self._grid.pp_size > 1
        # A server answers once its copies are queued; its GPU may still read the bucket. torch takes care of that for
        # memory that the sender lets go of: it is free again when the reader has closed it, which waits for the copies
        # (torch/csrc/CudaIPCTypes.cpp and StorageSharing.cpp). Memory that the sender writes again has no such guard
        self.renewed = not self._on_cpu
        self._first_rank: dict[EngineEntry, int] = {}  # of a server, over all servers
        self._readers: list[int] = []  # the engine ranks, over all servers, that read what this rank sends
        if self._on_cpu:
            # file descriptors cannot be handed to a process that is no child of ours
            torch.multiprocessing.set_sharing_strategy("file_system")
            # starts torch's shared memory manager now, not within a sync's deadline: it loads libtorch_cpu.so, which
            # took more than 10 s from a cold disk
            torch.empty(1, dtype=torch.uint8).share_memory_()

    def _connect(self, attempt: Attempt) -> None:
        members = attempt.members
        if self._on_cpu:
            starts = list(accumulate((member.ranks for member in members), initial=0))
            self._first_rank = dict(zip(members, starts, strict=False))
            self._readers = list(range(starts[-1]))
            return
        self._readers = [self._grid.rank]
        # the number in a server's name is its place among the GPUs (launch/fleet.py): engine-2 has the third group
        self._first_rank = {member: int(member.name.rsplit("-", 1)[1]) * member.ranks for member in members}

    def _buffers(self, num_bytes: int, count: int) -> list[Tensor]:
        flats = [torch.empty(num_bytes, dtype=torch.uint8, device=self._grid.device) for _ in range(count)]
        return [flat.share_memory_() if self._on_cpu else flat for flat in flats]

    def _send(self, attempt: Attempt, bucket: Bucket, tensors: Sequence[Tensor]) -> Callable[[], bool]:
        (flat,) = tensors
        if not self._on_cpu:
            torch.cuda.current_stream(flat.device).synchronize()  # the other process does not wait for our streams
        for reader in self._readers:
            attempt.post(f"handle/{bucket.number}/{reader}", _pickled(bucket, flat))
        return lambda: attempt.is_posted(f"loaded/{bucket.number}")

    def _load(
        self, attempt: Attempt, bucket: Bucket, version: int | None, control: EngineControl, entry: EngineEntry
    ) -> None:
        handles = []
        for rank in range(self._first_rank[entry], self._first_rank[entry] + entry.ranks):
            key = f"handle/{bucket.number}/{rank}"
            attempt.wait(partial(attempt.is_posted, key), f"packing bucket {bucket.number}")
            handles.append(attempt.read(key))
        control.load_handles(handles, weight_version=version)

    def _loaded(self, attempt: Attempt, bucket: Bucket) -> None:
        attempt.post(f"loaded/{bucket.number}")

    def _disconnect(self) -> None:
        return

    def close(self) -> None:
        return


def _pickled(bucket: Bucket, flat: Tensor) -> bytes:
    start = 0
    metadata = []
    for info in bucket.tensors:
        end = start + info.num_bytes
        metadata.append(
            SimpleNamespace(
                name=info.name,
                shape=tuple(info.shape),
                dtype=info.dtype,
                start_idx=start,
                end_idx=end,
                numel=info.num_bytes,
            )
        )
        start = end
    tensor: Any = flat[:start] if flat.device.type == "cpu" else _ByUuid(flat[:start])
    return bytes(ForkingPickler.dumps({"flattened_tensor": tensor, "metadata": metadata}))


class _ByUuid:
    """Unpickles as the CUDA tensor, opened on the GPU with the same UUID."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, arguments = reduce_tensor(self._tensor)
        values = list(arguments)
        values[DEVICE_ARGUMENT] = str(torch.cuda.get_device_properties(self._tensor.device).uuid)
        return rebuild, tuple(values)
