"""Conversion of a Hugging Face folder to a training checkpoint, one tensor at a time, divided over the ranks.

torch.distributed.checkpoint asks its planner for a tensor when it is about to write it. The tensor is read only then,
so the model is never in memory. The folder's headers are checked before a byte is written. The result is byte for byte
the checkpoint that an Actor with the folder's weights would save.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import torch as upstream
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.planner import WriteItem

from collab_megatron.errors import RunError, UserError
from collab_megatron.files import fsync_folder
from collab_megatron.model.folder import read_hf_config
from collab_megatron.model.safetensors_headers import StoredTensor, read_headers
from collab_megatron.model.spec import ModelSpec, model_spec
from collab_megatron.model.tables import rows
from collab_megatron.model.tensor_check import check_tensor_names
from collab_megatron.trainer.actor.actor import Actor
from collab_megatron.trainer.actor.agreement import fail_together, phase
from collab_megatron.trainer.actor.grid import RankGrid
from collab_megatron.trainer.checkpoint.manifest import ManifestEntry, manifest, meta_actor
from collab_megatron.trainer.checkpoint.state import PROGRESS, layout_of
from collab_megatron.trainer.convert.disk_space import is_disk_full
from collab_megatron.trainer.convert.hf_folder import copy_companions
from collab_megatron.trainer.convert.loader import SafetensorsFolder, require_finite
from collab_megatron.trainer.convert.progress_bar import Advance, progress
from collab_megatron.trainer.convert.reshape import join
from collab_megatron.trainer.convert.safetensors_io import DTYPES, read_into
from collab_megatron.wire.checkpoints import step_folder, write_marker

_SUPPORTED = (torch.float32, torch.bfloat16)


def checkpoint_from_hf(source: Path, directory: Path, grid: RankGrid, *, extra: Mapping[str, Any]) -> Path:
    """Write directory/step_00000000 with the weights of `source` in their own dtype; returns the folder.

    Collective over the ranks of `grid`, which must not cut the model (data ranks only). Raises UserError if the folder
    is not the model that its config.json describes, has several dtypes, or weights that are NaN or infinite; RunError
    if the checkpoint cannot be written. After an error nothing of the attempt is left.
    """
    doing = f"converting {source}"
    with fail_together(grid, doing, directory):
        spec = model_spec(read_hf_config(source))
        with SafetensorsFolder(source) as names:
            check_tensor_names(names.names, spec, names.folder)
        stored = read_headers(source)
        actor = meta_actor(source, _check_tensors(stored, spec), grid)
        mine = share(manifest(actor), grid.rank, grid.world_size)
    final = step_folder(directory, 0)
    aside = final.with_name(final.name + ".tmp")
    made = not directory.exists()
    try:
        with fail_together(grid, doing, directory):
            if grid.is_main:
                _prepare(source, aside)
        total = sum(entry.num_bytes for entry in mine)
        with progress("hf-to-megatron", total, show=grid.is_main) as advance:
            _write_tensors(mine, aside / "model", grid, _Planner(mine, stored, spec, advance))
        with fail_together(grid, doing, directory):
            if grid.is_main:
                _publish(actor, aside, final, extra)
    finally:
        if grid.is_main:
            shutil.rmtree(aside, ignore_errors=True)
            if made and not final.exists():
                shutil.rmtree(directory, ignore_errors=True)
    return final


def share(items: Iterable[ManifestEntry], rank: int, ranks: int) -> list[ManifestEntry]:
    """The tensors that one rank converts: consecutive ones in the table's order, about the same bytes for each rank."""
    every = list(items)
    total = sum(entry.num_bytes for entry in every)
    mine, before = [], 0
    for entry in every:
        if before * ranks // total == rank:
            mine.append(entry)
        before += entry.num_bytes
    return mine


def _check_tensors(stored: Mapping[str, StoredTensor], spec: ModelSpec) -> torch.dtype:
    """The dtype that all tensors of the model have. Raises UserError for a wrong shape or a second dtype."""
    first: StoredTensor | None = None
    for row in rows(spec):
        for name, dims in zip(row.hf, row.shapes, strict=True):
            found, wanted = stored[name], tuple(spec.dims[dim] for dim in dims)
            if found.shape != wanted:
                raise UserError(
                    f"tensor {name} in {found.file} has shape {list(found.shape)}; config.json asks for {list(wanted)}"
                )
            first = first or found
            if found.dtype != first.dtype:
                raise UserError(
                    f"tensor {name} in {found.file} is {found.dtype} and {first.name} {first.dtype}: save the model in "
                    "one dtype first"
                )
            itemsize = DTYPES[found.dtype].itemsize if found.dtype in DTYPES else 0
            if DTYPES.get(found.dtype) not in _SUPPORTED or found.num_bytes != torch.Size(wanted).numel() * itemsize:
                raise UserError(
                    f"tensor {name} in {found.file} is {found.dtype} of {found.num_bytes} bytes; float32 and bfloat16 "
                    "are supported"
                )
    assert first is not None
    return DTYPES[first.dtype]


class _Planner(upstream.MCoreSavePlanner):
    """Megatron's plan of a save; each tensor is read when torch asks for it."""

    def __init__(
        self, mine: Iterable[ManifestEntry], stored: Mapping[str, StoredTensor], spec: ModelSpec, advance: Advance
    ) -> None:
        super().__init__(flatten_state_dict=False, dedup_replicated_tensors=False)
        self._entries = {(entry.key, entry.offset): entry for entry in mine}
        self._stored, self._spec, self._advance = stored, spec, advance
        self._given: Tensor | None = None

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The tensor with megatron's leading axes. The one before it is freed: torch's writer keeps the last tensor of
        every name until its file is complete."""
        if self._given is not None:
            self._given.untyped_storage().resize_(0)
        assert write_item.tensor_data is not None, write_item
        entry = self._entries[write_item.index.fqn, tuple(write_item.index.offset or ())]
        self._given = self._read(entry).view(write_item.tensor_data.chunk.sizes)
        self._advance(entry.num_bytes)
        return self._given

    def _read(self, entry: ManifestEntry) -> Tensor:
        """The entry's value; the padding of the vocabulary is zero."""
        stored = [self._stored[name] for name in entry.names]
        dtype = entry.place.dtype
        if len(stored) > 1:
            parts = [torch.empty(tensor.shape, dtype=dtype) for tensor in stored]
            for tensor, part in zip(stored, parts, strict=True):
                read_into(tensor, part)
                require_finite(tensor.name, tensor.file, part)
            return join(entry.row, parts, self._spec, 1)
        whole = torch.empty(entry.shape, dtype=dtype)
        count = stored[0].shape[0]
        read_into(stored[0], whole[:count])
        require_finite(stored[0].name, stored[0].file, whole[:count])
        whole[count:].zero_()
        return whole


def _write_tensors(mine: list[ManifestEntry], folder: Path, grid: RankGrid, planner: _Planner) -> None:
    """Collective; raises on every rank if any rank cannot read or write."""
    places: dict[str, list[Any]] = {}
    for entry in mine:
        places.setdefault(entry.key, []).append(entry.place)
    # no copying ahead: it would keep several tensors and use one that resolve_data has freed
    writer = dcp.FileSystemWriter(folder, thread_count=1, per_thread_copy_ahead=0)
    try:
        with phase(grid, "converting"):
            dcp.save(
                upstream.mcore_to_pyt_state_dict(places, False),
                storage_writer=writer,
                planner=planner,
                process_group=grid.cpu_group,
            )
    except CheckpointException as error:  # a BaseException: rank -> (exception, traceback)
        rank, (reason, _) = next(iter(error.failures.items()))
        if is_disk_full(error, folder):
            raise RunError(f"disk full while writing to {folder.parent.parent}: free space and repeat") from error
        if isinstance(reason, KeyboardInterrupt | UserError):
            raise reason from error
        raise RunError(f"rank {rank} could not convert its tensors: {type(reason).__name__}: {reason}") from error


def _prepare(source: Path, aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "model").mkdir(parents=True)
    (aside / "hf").mkdir()
    copy_companions(source, aside / "hf")


def _publish(actor: Actor, aside: Path, final: Path, extra: Mapping[str, Any]) -> None:
    """Write megatron's files next to the tensors, then the marker; then rename the folder."""
    torch.save({PROGRESS: {}}, aside / "model" / "common.pt")
    save_config(CheckpointingConfig("torch_dist", 1), str(aside / "model"))
    fsync_folder(aside / "model")
    fsync_folder(aside / "hf")
    # the ranks of a conversion hold no shards
    write_marker(aside, step=0, layout={**layout_of(actor), "data": 1}, extra=extra)
    fsync_folder(aside)
    aside.rename(final)
    fsync_folder(final.parent)
