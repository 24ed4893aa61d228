"""Conversion of a training checkpoint to a Hugging Face folder, one tensor at a time, files divided over the ranks.

    python -m collab_megatron.trainer.checkpoint.to_hf STEP_FOLDER OUTPUT          in one process, on CPU

Only weights are read, and of a tensor only the chunks that it overlaps, whatever the layout of the training run.
tools/convert_checkpoint.py has the options.
"""

from __future__ import annotations

import contextlib
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from collab_megatron.config.sections import ParallelSection
from collab_megatron.errors import RunError, UserError, run_cli
from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.actor.agreement import fail_together, on_rank_zero
from collab_megatron.trainer.actor.grid import RankGrid, close_grid, init_grid
from collab_megatron.trainer.checkpoint.manifest import ManifestEntry, manifest, meta_actor
from collab_megatron.trainer.checkpoint.reader import read_metadata
from collab_megatron.trainer.convert.buckets import TensorInfo
from collab_megatron.trainer.convert.hf_folder import (
    atomic_folder,
    cut_into_shards,
    finish_folder,
    parse_size,
    write_shard,
)
from collab_megatron.trainer.convert.progress_bar import progress
from collab_megatron.trainer.convert.reshape import split
from collab_megatron.wire.checkpoints import CheckpointInfo, read_info


def hf_from_checkpoint(info: CheckpointInfo, output: Path, grid: RankGrid, *, max_shard_size: str | int) -> None:
    """Write the weights of a complete checkpoint as folder `output`.

    Every file's header contains the step, and the run if the checkpoint has it. Collective over the ranks of `grid`,
    which must not cut the model (data ranks only). Raises UserError if the checkpoint is not the model that its
    config.json describes, RunError if it cannot be read or `output` cannot be written. After an error nothing of the
    attempt is left.
    """
    limit = parse_size(max_shard_size)
    doing = f"converting {info.folder}"
    with fail_together(grid, doing, output.parent):
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[info.layout["dtype"]]
        actor = meta_actor(info.hf_folder, dtype, grid)
        tensors = _CheckpointTensors(info.model_folder, actor)
    shards = cut_into_shards(actor.tensor_plan(), limit)
    mine = range(grid.rank, len(shards), grid.world_size)
    total = sum(tensor.num_bytes for number in mine for tensor in shards[number])
    with _folder_of_all(output, grid, doing) as aside:
        with fail_together(grid, doing, aside), progress("megatron-to-hf", total, show=grid.is_main) as advance:
            for number in mine:
                write_shard(aside, number, shards[number], tensors.read(shards[number], advance), _header(info))
        with fail_together(grid, doing, aside):
            if grid.is_main:
                finish_folder(aside, shards, info.hf_folder)


class _CheckpointTensors:
    """A checkpoint's weights by their Hugging Face names."""

    def __init__(self, folder: Path, actor: Actor) -> None:
        """Raises UserError if a tensor of the model is missing in the checkpoint or has another shape or dtype."""
        self._folder, self._spec, self._dtype = folder, actor.spec, actor.dtype
        metadata = read_metadata(folder / ".metadata")
        self._reader = dcp.FileSystemReader(folder)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        stored: Any = metadata.state_dict_metadata
        self._stored: Mapping[str, TensorStorageMetadata] = stored  # _check makes sure that they are tensors
        self._entries: dict[str, ManifestEntry] = {}
        leading: dict[str, int] = {}
        for entry in manifest(actor):
            self._check(entry)
            leading[entry.key] = entry.place.prepend_axis_num
            self._entries |= dict.fromkeys(entry.names, entry)
        # by layer and expert: otherwise every tensor would be compared with the chunks of all layers
        self._chunks: dict[tuple[Any, ...], list[ChunkStorageMetadata]] = defaultdict(list)
        for key, axes in leading.items():
            for chunk in self._stored[key].chunks:
                self._chunks[key, *chunk.offsets[:axes]].append(chunk)

    def read(self, plan: Sequence[TensorInfo], advance: Any) -> Iterator[Tensor]:
        """The tensors of `plan`, one at a time; a fused tensor is read once for all its parts."""
        last: ManifestEntry | None = None
        parts: dict[str, Tensor] = {}
        for info in plan:
            entry = self._entries[info.name]
            if entry is not last:
                parts.clear()
                parts.update(zip(entry.names, self._parts(entry), strict=True))
                last = entry
            yield parts.pop(info.name)
            advance(info.num_bytes)

    def _parts(self, entry: ManifestEntry) -> tuple[Tensor, ...]:
        whole = self._read(entry)
        return split(entry.row, whole, self._spec, 1) if len(entry.names) > 1 else (whole,)

    def _read(self, entry: ManifestEntry) -> Tensor:
        """The entry without the padding of the vocabulary."""
        shape = self._unpadded(entry)
        target = torch.empty(shape, dtype=self._dtype)
        axes = entry.place.prepend_axis_num
        stored = self._stored[entry.key]
        near = TensorStorageMetadata(stored.properties, stored.size, self._chunks[entry.key, *entry.offset[:axes]])
        wanted = ChunkStorageMetadata(torch.Size(entry.offset), torch.Size((1,) * axes + shape))
        items = create_read_items_for_chunk_list(entry.key, near, [wanted])
        if sum(item.lengths.numel() for item in items) != target.numel():
            raise UserError(f"{entry.row.megatron} is incomplete in {self._folder}: use another checkpoint")
        try:
            self._reader.read_data(LoadPlan(items), _ReadInto(target.view(wanted.sizes)))
        except Exception as error:  # a damaged file raises anything
            raise RunError(f"{entry.row.megatron} cannot be read from {self._folder}: {error!r}") from error
        return target

    def _unpadded(self, entry: ManifestEntry) -> tuple[int, ...]:
        return (self._spec.vocab, *entry.shape[1:]) if entry.row.is_vocab else entry.shape

    def _check(self, entry: ManifestEntry) -> None:
        name, wanted = entry.row.megatron, list(entry.place.global_shape)
        stored = self._stored.get(entry.key)
        if not isinstance(stored, TensorStorageMetadata):
            raise UserError(f"tensor {name} of shape {list(entry.shape)} is missing in {self._folder} ({entry.key})")
        found = list(stored.size)
        if entry.row.is_vocab and found[0] >= self._spec.vocab:
            found[0] = wanted[0]  # padded for the layout of the run
        if found != wanted:
            raise UserError(
                f"tensor {entry.key} in {self._folder} has shape {list(stored.size)}; config.json asks for {wanted}"
            )
        if stored.properties.dtype != self._dtype:
            raise UserError(f"tensor {entry.key} in {self._folder} is {stored.properties.dtype}, not {self._dtype}")


class _ReadInto(DefaultLoadPlanner):
    """Gives torch's reader the tensor to read into."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._target


def _header(info: CheckpointInfo) -> dict[str, str]:
    """Step and run of the checkpoint, for the header of a file."""
    run = info.extra.get("config", {}).get("run", {})
    known = {"run": run.get("dir"), "name": run.get("name"), "source": info.extra.get("source")}
    return {"step": str(info.step), **{key: str(value) for key, value in known.items() if value is not None}}


@contextlib.contextmanager
def _folder_of_all(output: Path, grid: RankGrid, doing: str) -> Iterator[Path]:
    """Rank 0's atomic_folder(output), on every rank. Rank 0 publishes the folder at the end of the block."""
    with contextlib.ExitStack() as stack:
        aside = output
        with fail_together(grid, doing, output.parent):
            if grid.is_main:
                aside = stack.enter_context(atomic_folder(output))
        yield on_rank_zero(grid, lambda: aside)


def main() -> None:
    if len(sys.argv) != 3:
        raise UserError("name two folders: python -m collab_megatron.trainer.checkpoint.to_hf STEP_FOLDER OUTPUT")
    checkpoint, output = map(Path, sys.argv[1:])
    info = read_info(checkpoint)
    try:
        grid = init_grid(ParallelSection(device="cpu"), seed=0)
        hf_from_checkpoint(info, output, grid, max_shard_size="5GB")
    finally:
        close_grid()  # after a failure too: torch's threads must end before the interpreter


if __name__ == "__main__":
    run_cli(main)
