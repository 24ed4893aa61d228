"""Transport `ipc`: the servers load a bucket from memory that the trainer shares with them.

On GPUs: CUDA IPC handles, from the trainer rank that has the same GPU as the engine rank (`placement: colocated`).
On CPU: shared memory of one machine, one copy for all engine ranks. Handles are what torch.multiprocessing pickles, one
for every engine rank: each counts as one reader, and memory that was read more often than it was pickled is unlinked
under the trainer's feet. The bucket's description is sglang's (weight_updater.py,
`_update_weights_from_flattened_bucket`), made of plain namespaces, so that the trainer needs no sglang.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from collab_megatron.engine.control import EngineControl
from collab_megatron.trainer.actor.grid import RankGrid
from collab_megatron.trainer.convert.buckets import Bucket
from collab_megatron.trainer.sync.attempt import Board
from collab_megatron.trainer.sync.servers import Receivers
from collab_megatron.trainer.sync.transport import is_stage_sender
from collab_megatron.wire.roster import EngineEntry

DEVICE_ARGUMENT = 6
"""Of torch.multiprocessing.reductions.rebuild_cuda_tensor: the device; sglang takes its UUID there, since the two
processes may count GPUs differently (sglang/srt/utils/patch_torch.py)."""


class IpcTransport:
    """Handles go over the board to rank 0, which posts them; nothing is kept from sync to sync."""

    def __init__(self, grid: RankGrid, board: Board) -> None:
        self._grid, self._board = grid, board
        self._on_cpu = grid.device.type == "cpu"
        # on GPUs every rank speaks for its own device, and that for all stages: its engine rank holds them all
        self.offers = is_stage_sender(grid) if self._on_cpu else True
        self.one_by_one = False
        self.in_turn = False
        self.every_stage = not self._on_cpu and grid.pp_size > 1
        self._first_rank: dict[EngineEntry, int] = {}  # of a server, over all servers
        self._readers: list[int] = []  # the engine ranks, over all servers, that read what this rank hands over
        if self._on_cpu:
            # file descriptors cannot be handed to a process that is no child of ours
            torch.multiprocessing.set_sharing_strategy("file_system")

    def prepare(self, members: Sequence[EngineEntry], receivers: Receivers | None) -> None:
        if self._on_cpu:
            starts = list(accumulate((member.ranks for member in members), initial=0))
            self._first_rank = dict(zip(members, starts, strict=False))
            self._readers = list(range(starts[-1]))
            return
        self._readers = [self._grid.rank]
        # a server's place among the GPUs is in its name (cluster/fleet.py): engine-2 has the third group of them
        self._first_rank = {member: int(member.name.rsplit("-", 1)[1]) * member.ranks for member in members}

    def buffers(self, num_bytes: int, count: int) -> list[Tensor]:
        flats = [torch.empty(num_bytes, dtype=torch.uint8, device=self._grid.device) for _ in range(count)]
        return [flat.share_memory_() if self._on_cpu else flat for flat in flats]

    def offer(self, bucket: Bucket, tensors: Sequence[Tensor]) -> Callable[[], bool]:
        (flat,) = tensors
        if not self._on_cpu:
            torch.cuda.current_stream(flat.device).synchronize()  # the other process does not wait for our streams
        for reader in self._readers:
            self._board.post(f"handle/{bucket.number}/{reader}", _pickled(bucket, flat))
        return lambda: self._board.posted(f"taken/{bucket.number}")

    def receive(self, control: EngineControl, entry: EngineEntry, bucket: Bucket, weight_version: int | None) -> None:
        handles = [self._handle(bucket, self._first_rank[entry] + rank) for rank in range(entry.ranks)]
        control.load_handles(handles, weight_version=weight_version)

    def _handle(self, bucket: Bucket, engine_rank: int) -> bytes:
        key = f"handle/{bucket.number}/{engine_rank}"
        self._board.wait(lambda: self._board.posted(key), f"packing bucket {bucket.number}")
        return self._board.read(key)

    def taken(self, bucket: Bucket) -> None:
        self._board.post(f"taken/{bucket.number}")

    def reset(self) -> None:
        return

    def leave(self, receivers: Receivers) -> None:
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
